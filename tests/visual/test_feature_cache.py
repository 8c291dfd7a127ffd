"""Features of a frozen tower on disk: what is served, what is not, and what becomes of failures."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import ROOT, environment, make_pictures
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint

from visual import build_vision_tower
from visual.feature_cache import DTYPES, KEY_BYTES, FeatureCache, open_feature_cache, tower_key

KEY = bytes(range(KEY_BYTES))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return make_clip_checkpoint(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def tower(clip):
    return build_vision_tower(clip)


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache" / "0123-bfloat16", (4, 32), torch.bfloat16)


def features(seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key_rows(*keys: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)


def key_row(key: bytes = KEY) -> np.ndarray:
    return key_rows(key)


def files_in(cache: FeatureCache) -> list[str]:
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*") if path.is_file())


# ---- What is stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, dtype):
    cache = FeatureCache(tmp_path / f"a-{dtype}", (4, 32), DTYPES[dtype])
    assert cache.read(KEY) is None
    assert not cache.has(KEY)
    cache.write(KEY, features(dtype=DTYPES[dtype]))
    assert cache.has(KEY)
    assert torch.equal(cache.read(KEY), features(dtype=DTYPES[dtype]))
    assert cache.read(bytes(KEY_BYTES)) is None
    assert files_in(cache) == [f"00/{KEY.hex()}.safetensors"]
    assert cache.path_of(KEY).stat().st_size == cache.file_bytes
    assert cache.file_bytes == pytest.approx(4 * 32 * DTYPES[dtype].itemsize, abs=256)
    assert len(cache) == 1


def test_the_size_of_a_file_does_not_depend_on_what_is_in_it(cache):
    for seed in range(20):
        key = os.urandom(KEY_BYTES)
        cache.write(key, features(seed))
        assert cache.path_of(key).stat().st_size == cache.file_bytes
    assert len(cache) == 20


def test_it_can_be_sent_to_a_worker(cache):
    cache.write(KEY, features())
    assert len(pickle.dumps(cache)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read(KEY), features())


def test_files_are_as_open_to_others_as_new_files_are(cache):
    cache.write(KEY, features())
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(cache.path_of(KEY).stat().st_mode) == 0o666 & ~mask


def test_the_key_of_an_image_is_its_content(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    copy = shutil.copy(pictures["red"], tmp_path / "other name.jpg")
    assert FeatureCache.key_of(pictures["red"]) == FeatureCache.key_of(copy)
    assert FeatureCache.key_of(pictures["red"]) != FeatureCache.key_of(pictures["blue"])
    assert len(FeatureCache.key_of(copy)) == KEY_BYTES
    before, times = FeatureCache.key_of(copy), Path(copy).stat()
    data = bytearray(Path(copy).read_bytes())
    data[-20] ^= 1
    Path(copy).write_bytes(data)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FeatureCache.key_of(copy) != before, "same name, size and time, other content"


def test_what_is_no_file_has_no_key(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((1 << 30) + 1)
    for name in ("missing", "pipe", "huge", ".", "nul\0", "\udcff"):
        assert FeatureCache.key_of(f"{tmp_path}/{name}") is None


# ---- Never stale


def test_the_key_of_a_tower_is_its_weights_settings_transform_and_dtype(tmp_path, clip):
    key = tower_key(build_vision_tower(clip))
    assert tower_key(build_vision_tower(shutil.copytree(clip, tmp_path / "copy"))) == key

    def changed(name: str, change) -> str:
        folder = Path(shutil.copytree(clip, tmp_path / name))
        change(folder)
        return tower_key(build_vision_tower(str(folder)))

    def one_weight(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = next(n for n in weights if n.startswith("vision_model") and n.endswith("fc1.weight"))
        weights[name][7, 13] += 1e-3
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def settings(file: str, *path: str, value):
        def change(folder: Path) -> None:
            content = inner = json.loads((folder / file).read_text())
            for name in path[:-1]:
                inner = inner[name]
            assert inner[path[-1]] != value
            inner[path[-1]] = value
            (folder / file).write_text(json.dumps(content))

        return change

    transform = "preprocessor_config.json"
    if not (Path(clip) / transform).exists():
        transform = "processor_config.json"
    keys = {
        key,
        changed("one weight of thousands", one_weight),
        changed("activation", settings("config.json", "vision_config", "hidden_act", value="gelu")),
        changed("epsilon", settings("config.json", "vision_config", "layer_norm_eps", value=1e-3)),
        changed("mean", settings(transform, "image_mean", value=[0.5, 0.5, 0.5])),
        changed("filter", settings(transform, "resample", value=2)),
        changed("size", settings(transform, "size", value={"shortest_edge": 29})),
        tower_key(build_vision_tower(clip, torch.bfloat16)),
        tower_key(build_vision_tower(make_clip_checkpoint(tmp_path / "seed", seed=1))),
    }
    assert len(keys) == 9
    siglip = make_siglip_checkpoint(tmp_path / "siglip")
    assert tower_key(build_vision_tower(siglip)) != tower_key(build_vision_tower(siglip, drop_first_patch=True))


def test_the_key_is_the_same_in_another_process(clip):
    code = f"from visual import *; from visual.feature_cache import *; print(tower_key(build_vision_tower({clip!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == tower_key(build_vision_tower(clip)), done.stderr


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(data)


def damage_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 8 + data[8:])


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_shape(path: Path) -> None:
    path.write_bytes(FeatureCache(path.parents[1], (32, 4), torch.bfloat16)._serialise(KEY, features().view(32, 4)))


def damage_dtype(path: Path) -> None:
    path.write_bytes(FeatureCache(path.parents[1], (4, 32), torch.float16)._serialise(KEY, features().half()))


def damage_other_picture(path: Path) -> None:
    path.write_bytes(FeatureCache(path.parents[1], (4, 32), torch.bfloat16)._serialise(bytes(32), features(1)))


def damage_other_tower(path: Path) -> None:
    other = FeatureCache(Path("9999-bfloat16"), (4, 32), torch.bfloat16)
    path.write_bytes(other._serialise(KEY, features(1)))


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_file_is_said_once_and_replaced(cache, damage, caplog):
    cache.write(KEY, features())
    damage(cache.path_of(KEY))
    assert cache.read(KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.messages[0]
    assert "damaged" in message
    assert str(cache.path_of(KEY)) in message
    assert "\n" not in message
    if damage is damage_folder:
        return
    cache.write(KEY, features())
    assert torch.equal(cache.read(KEY), features())


# ---- Failures


def test_a_batch_comes_back_as_it_will_be_read(cache):
    batch = torch.randn(3, 4, 32)
    keys = key_rows(KEY, bytes(KEY_BYTES), bytes([7] * KEY_BYTES))
    out = cache.remember(batch, keys)
    assert torch.equal(out, batch.bfloat16())
    assert torch.equal(cache.read(KEY), out[0])
    assert torch.equal(cache.read(bytes([7] * KEY_BYTES)), out[2])
    assert len(cache) == cache.num_stored == 2, "a row of zeros is not to be stored"
    assert cache.remember(batch[:0], keys[:0]).shape == (0, 4, 32)


def test_what_the_dtype_cannot_hold_is_kept_and_not_stored(tmp_path, caplog):
    cache = FeatureCache(tmp_path / "c", (4, 32), torch.float16)
    batch = torch.randn(2, 4, 32)
    batch[1, 2, 3] = 1e6
    keys = key_rows(KEY, bytes([7] * KEY_BYTES))
    for _ in range(2):
        out = cache.remember(batch, keys)
        assert torch.equal(out[0], batch[0].half().float())
        assert torch.equal(out[1], batch[1])
        assert list(cache.misfits) == [bytes([7] * KEY_BYTES)]
    cache.remember(batch[:1], keys[:1])
    assert cache.misfits == {}
    assert len(cache) == 1
    assert len(caplog.messages) == 1
    assert "float16" in caplog.messages[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_are_no_numbers_are_said_to_be_so(tmp_path, caplog, dtype, value):
    cache = FeatureCache(tmp_path / "c", (4, 32), DTYPES[dtype])
    batch = torch.randn(1, 4, 32)
    batch[0, 2, 3] = value
    for _ in range(2):
        assert torch.equal(cache.remember(batch, key_row()).nan_to_num(), batch.nan_to_num())
    assert len(cache) == 0
    assert len(caplog.messages) == 1
    assert "infinite or no numbers" in caplog.messages[0]
    assert "range" not in caplog.messages[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_said_once_and_leaves_nothing(cache, caplog, monkeypatch, number):
    cache.write(KEY, features())
    there = files_in(cache)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    for seed in range(3):
        batch = features(seed)[None].float()
        assert torch.equal(cache.remember(batch, key_row(bytes([seed] * KEY_BYTES)[:-1] + b"x")), batch.bfloat16())
    assert len(caplog.messages) == 1
    assert os.strerror(number) in caplog.messages[0]
    assert cache.failure == os.strerror(number)
    assert files_in(cache) == there
    assert torch.equal(cache.read(KEY), features()), "what is there can still be read"


def test_a_file_size_limit_leaves_no_half_written_file(cache):
    pid = os.fork()
    if pid == 0:  # the limit can't be taken back
        logging.disable()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        cache.remember(features()[None], key_row())
        os._exit(0 if cache.failure and files_in(cache) == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache.read(KEY) is None


def test_an_interrupt_in_a_write_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.write(KEY, features())
    assert files_in(cache) == []


def test_a_kill_in_a_write_is_swept_up_later(tmp_path, tower, monkeypatch):
    cache = open_feature_cache(tmp_path, tower, "bfloat16")
    pid = os.fork()
    if pid == 0:
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        cache.write(KEY, features())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (left,) = (cache.folder / "tmp").iterdir()
    assert cache.read(KEY) is None
    assert len(cache) == 0
    open_feature_cache(tmp_path, tower, "bfloat16")
    assert left.exists(), "another process may be writing it"
    os.utime(left, (0, time.time() - 7200))
    open_feature_cache(tmp_path, tower, "bfloat16")
    assert not left.exists()


def write_many(cache: FeatureCache, rounds: int) -> None:
    for number in range(rounds):
        for seed in range(5):
            cache.write(bytes([seed] * KEY_BYTES), features(seed))
            read = cache.read(bytes([(seed + number) % 5] * KEY_BYTES))
            assert read is None or torch.equal(read, features((seed + number) % 5))


def test_processes_that_write_the_same_at_once(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(cache, 30)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files_in(cache)) == 5
    assert all(torch.equal(cache.read(bytes([seed] * KEY_BYTES)), features(seed)) for seed in range(5))


# ---- Opening


def test_opening_says_what_the_folder_holds(tmp_path, tower, clip, caplog):
    caplog.set_level(logging.INFO)
    cache = open_feature_cache(tmp_path / "a" / "b", tower, "float16")
    assert cache.folder == tmp_path / "a" / "b" / f"{tower_key(tower)}-float16"
    assert (cache.shape, cache.dtype) == ((4, 32), torch.float16)
    note = json.loads((cache.folder / "tower.json").read_text())
    assert note == {"tower": clip, "kind": "clip", "shape": [4, 32], "dtype": "float16"}
    assert str(cache.folder) in caplog.text
    assert list((cache.folder / "tmp").iterdir()) == []
    assert len(cache) == 0


def test_folders_that_cannot_be(tmp_path, tower, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--feature_cache .*file is a file; give a folder"):
        open_feature_cache(tmp_path / "file", tower, "bfloat16")
    with pytest.raises(ValueError, match=r"can't be made \(Not a directory\); give a folder"):
        open_feature_cache(tmp_path / "file" / "below", tower, "bfloat16")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    cache = open_feature_cache(tmp_path / "full", tower, "bfloat16")
    cache.remember(features()[None], key_row())
    assert cache.failure == os.strerror(errno.ENOSPC)


def test_a_picture_through_the_tower_is_stored_under_its_content(tmp_path, tower):
    cache = open_feature_cache(tmp_path, tower, "float32")
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    with Image.open(path) as image:
        made = tower(tower.image_transform(image.convert("RGB"))[None])
    key = cache.key_of(path)
    cache.remember(made, key_row(key))
    assert torch.equal(cache.read(key), made[0])
