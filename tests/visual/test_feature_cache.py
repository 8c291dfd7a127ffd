"""Features of a frozen tower on disk: what is served, what is not, and what becomes of failures."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import make_pictures

from dataprocess.image_bytes import content_key
from model.feature_caching.disk import lack_of_space, pictures_stored
from model.feature_caching.image_list import ImageList
from visual import build_vision_tower
from visual.feature_cache import DTYPES, FeatureCache, open_feature_cache, published_weights, tower_key

KEY = bytes(range(32))


@pytest.fixture
def tower(checkpoints):
    return build_vision_tower(checkpoints["clip"])


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache" / "0123-bfloat16", (4, 32), torch.bfloat16)


def features(seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files_in(cache: FeatureCache) -> list[str]:
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*") if path.is_file())


# ---- What is stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, dtype):
    cache = FeatureCache(tmp_path / f"a-{dtype}", (4, 32), DTYPES[dtype])
    assert cache.read(KEY) is None
    cache.write(KEY, features(dtype=DTYPES[dtype]))
    assert torch.equal(cache.read(KEY), features(dtype=DTYPES[dtype]))
    assert cache.read(bytes(32)) is None
    assert files_in(cache) == [f"00/{KEY.hex()}.safetensors"]
    assert cache.path_of(KEY).stat().st_size == cache.file_bytes
    assert cache.num_pictures() == 1


def test_files_of_an_earlier_version_are_read(tmp_path):
    """Layout, names and checksum as they were written before filling moved out of training."""
    import zlib

    cache = FeatureCache(tmp_path / "0123-float32", (4, 32), torch.float32)
    value = features(dtype=torch.float32)
    check = zlib.crc32(value.numpy().tobytes(), zlib.crc32(b"0123-float32" + KEY))
    (tmp_path / "0123-float32" / "00").mkdir(parents=True)
    file = tmp_path / "0123-float32" / "00" / f"{KEY.hex()}.safetensors"
    save_file({"features": value, "check": torch.tensor([check])}, file)
    assert torch.equal(cache.read(KEY), value)


def test_the_key_of_an_image_is_its_content(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    copy = shutil.copy(pictures["red"], tmp_path / "other name.jpg")
    assert content_key(pictures["red"]) == content_key(copy)
    assert content_key(pictures["red"]) != content_key(pictures["blue"])
    before, times = content_key(copy), Path(copy).stat()
    data = bytearray(Path(copy).read_bytes())
    data[-20] ^= 1
    Path(copy).write_bytes(data)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_key(copy) != before, "same name, size and time, other content"


def test_what_is_no_file_has_no_key(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((1 << 30) + 1)
    for name in ("missing", "pipe", "huge", ".", "nul\0", "\udcff"):
        assert content_key(f"{tmp_path}/{name}") is None


# ---- Never stale


def with_weights(change):
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def with_setting(file: str, **values):
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (content.get("vision_config", content) if file == "config.json" else content).update(values)
        (folder / file).write_text(json.dumps(content))

    return apply


QUERY, KEYS = (f"vision_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in ("q", "k"))
CHANGES = {
    "one weight": with_weights(lambda weights: weights[QUERY][7, 13].add_(1e-3)),
    "weights change places": with_weights(lambda w: w.update({QUERY: w[KEYS], KEYS: w[QUERY]})),
    "activation": with_setting("config.json", hidden_act="gelu"),
    "epsilon": with_setting("config.json", layer_norm_eps=1e-3),
    "heads": with_setting("config.json", num_attention_heads=2),
    "mean": with_setting("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "deviation": with_setting("preprocessor_config.json", image_std=[0.5, 0.5, 0.5]),
    "filter": with_setting("preprocessor_config.json", resample=2),
    "scale": with_setting("preprocessor_config.json", rescale_factor=0.5),
    "not normalised": with_setting("preprocessor_config.json", do_normalize=False),
    "size": with_setting("preprocessor_config.json", size={"shortest_edge": 29}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_features_changes_the_towers_key(tmp_path, checkpoints, tower, change):
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "changed"))
    assert tower_key(build_vision_tower(folder)) == tower_key(tower), "a moved one is the same"
    change(folder)
    assert tower_key(build_vision_tower(folder)) != tower_key(tower)


def test_the_positions_of_dinov3_are_in_its_key(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["dinov3_vit"], tmp_path / "changed"))
    key = tower_key(build_vision_tower(folder))
    assert key == tower_key(build_vision_tower(checkpoints["dinov3_vit"]))
    with_setting("config.json", rope_theta=50.0)(folder)
    assert tower_key(build_vision_tower(folder)) != key


def test_dtype_names_and_dropped_patches_are_in_the_towers_key(checkpoints, tower):
    clip, siglip = checkpoints["clip"], checkpoints["siglip"]
    towers = [tower, build_vision_tower(clip, torch.float16), build_vision_tower(clip, torch.float16)]
    for parameter in towers[2].parameters():
        parameter.data = parameter.data.view(torch.bfloat16)  # the same bytes
    towers += [build_vision_tower(clip), build_vision_tower(clip)]
    towers[3].model.register_buffer("one_name", torch.ones(3))
    towers[4].model.register_buffer("another_name", torch.ones(3))
    towers += [build_vision_tower(siglip), build_vision_tower(siglip, drop_first_patch=True)]
    assert len({tower_key(tower) for tower in towers}) == len(towers)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov3_vit", "vit"])
def test_the_towers_key_is_that_of_the_published_files(checkpoints, kind, monkeypatch):
    """What another version of transformers calls a weight, or adds to a configuration, changes no key."""
    tower = build_vision_tower(checkpoints[kind])
    in_file = load_file(Path(checkpoints[kind]) / "model.safetensors")
    assert set(published_weights(tower.model)) <= {name.removeprefix("vision_model.") for name in in_file}
    key = tower_key(tower)
    tower.config.a_later_setting = 7
    monkeypatch.setattr(type(tower.image_transform.processor), "a_later_setting", 7, raising=False)
    assert tower_key(tower) == key


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(data)


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become(shape: tuple[int, int], key: bytes = KEY, folder: str = "0123-bfloat16"):
    """Hold what another picture's, tower's or format's file would hold."""
    other = FeatureCache(Path(folder), shape, torch.bfloat16)
    return lambda path: path.write_bytes(other._serialise(key, features(1).view(shape)))


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "one bit": flip_a_bit,
    "pipe": become_a_pipe,
    "other shape": become((32, 4)),
    "other picture": become((4, 32), key=bytes(32)),
    "other tower": become((4, 32), folder="9999-bfloat16"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_said_once_and_can_be_replaced(cache, damage, caplog):
    cache.write(KEY, features())
    damage(cache.path_of(KEY))
    assert cache.read(KEY) is None
    (message,) = caplog.messages
    assert str(cache.path_of(KEY)) in message
    assert "\n" not in message
    cache.write(KEY, features())
    assert torch.equal(cache.read(KEY), features())


# ---- Failures


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(cache, monkeypatch, error):
    cache.write(KEY, features())
    stored = files_in(cache)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        cache.write(bytes(32), features())
    assert files_in(cache) == stored
    assert torch.equal(cache.read(KEY), features())


def write_many(cache: FeatureCache, rounds: int) -> None:
    for number in range(rounds):
        for seed in range(5):
            cache.write(bytes([seed] * 32), features(seed))
            read = cache.read(bytes([(seed + number) % 5] * 32))
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
    assert all(torch.equal(cache.read(bytes([seed] * 32)), features(seed)) for seed in range(5))


# ---- Opening


def test_folders_of_the_same_tower_by_name_that_are_not_used_are_named(tmp_path, tower, caplog):
    """Those of an earlier version, for one, whose keys depended on the version of transformers."""
    old = FeatureCache(tmp_path / "0123-bfloat16", (4, 32), torch.bfloat16)
    old.write(KEY, features())
    note = {"tower": tower.name_or_path, "kind": "clip", "shape": [4, 32], "dtype": "bfloat16"}
    (old.folder / "tower.json").write_text(json.dumps(note))
    lack_of_space(open_feature_cache(tmp_path, tower, "float16"), tower, ImageList([], False))
    assert not caplog.messages
    lack_of_space(open_feature_cache(tmp_path, tower, "bfloat16"), tower, ImageList([], False))
    assert str(old.folder) in caplog.messages[0]
    assert pictures_stored(tmp_path, tower.name_or_path, (4, 32), "bfloat16")["0123-bfloat16"] == 1


def test_a_folder_that_cannot_be(tmp_path, tower):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--feature_cache .*file/below"):
        open_feature_cache(tmp_path / "file" / "below", tower, "bfloat16")


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path, tower, monkeypatch):
    cache = open_feature_cache(tmp_path, tower, "bfloat16")
    cache.write(KEY, features())

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert torch.equal(open_feature_cache(tmp_path, tower, "bfloat16").read(KEY), features())


# ---- Which pictures


def test_pictures_are_listed_once_in_their_order_and_shared_out(tmp_path):
    names = ["b.png", "a.png", "b.png", "\udce4.png", "键.png", "a.png", "c.png"]
    images = ImageList(((str(tmp_path), name) for name in names), False)
    expected = [tmp_path / name for name in ("b.png", "a.png", "\udce4.png", "键.png", "c.png")]
    assert list(images) == expected
    assert [list(images.share(number, 2)) for number in (0, 1)] == [expected[::2], expected[1::2]]
    assert list(images.share(1, 2).share(1, 2)) == [expected[3]]


def test_a_picture_takes_its_name_and_a_few_bytes(tmp_path):
    """A set of names and a list of paths would take half a kilobyte each."""
    kept = []
    for number in (1_000, 11_000):
        tracemalloc.start()
        images = ImageList((("/pictures", f"{index:020d}.jpg") for index in range(number)), False)
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(images) == number
    assert (kept[1] - kept[0]) / 10_000 < 80
