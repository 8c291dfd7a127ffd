"""--pixel_shuffle: fewer, wider tokens for an image, from training through checkpoints to answers and exports."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_run import MIXED_CAPTIONS, load_test_py, losses, one_line_error, trained_weights, write_data
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint, pixels
from tiny_vlm import enliven_trained

import train
from dataset.prompt import encode_prompt
from model import LoraSettings, VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from model.checkpoints.folder import CheckpointError
from model.checkpoints.saving import write_checksums
from model.pixel_shuffle import check_pixel_shuffle, shuffle_pixels

QUICK = [
    *("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"),
    *("--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--save_steps", "3"),
]
NOTE = "multimodal_config.json"
W = 32
"""Width of the tiny towers, whose grid is 2 × 2."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures) -> list[str]:
    return write_data(tmp_path_factory.mktemp("data"), MIXED_CAPTIONS, pictures["red"].parent)


@pytest.fixture(scope="module")
def command(base_flags, data) -> list[str]:
    return [*base_flags, *data, *QUICK, "--pixel_shuffle", "2"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Six steps with pixel shuffle, never stopped; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*command, "--output_dir", str(folder)]) == 0
    return folder


def shuffled_model(*bases: str, **kwargs) -> VisionLanguageModel:
    model = VisionLanguageModel.from_pretrained(*bases, device="cpu", trainable=True, pixel_shuffle=2, **kwargs)
    model.add_lora(LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=None))
    return enliven_trained(model)


# ---- The order of patches and channels


def test_blocks_and_their_patches_go_row_by_row():
    """A grid of 4 × 4 patches of two channels; each patch says its row and column."""
    grid = torch.tensor([[row * 10 + column, -1] for row in range(4) for column in range(4)])[None]  # (1, 16, 2)
    tokens = shuffle_pixels(grid, 2)
    assert tokens.shape == (1, 4, 8)
    assert (tokens[..., 1::2] == -1).all()
    assert tokens[0, :, ::2].tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 2), (6, 3), (27, 3), (16, 2), (2, 2)])
def test_it_is_what_unfold_gives(side, factor):
    """`unfold` has channels first within a block."""
    features = torch.randn(2, side * side, 3)
    image = features.transpose(1, 2).reshape(2, 3, side, side)
    blocks = torch.nn.functional.unfold(image, factor, stride=factor)  # (2, 3 · f², tokens)
    expected = blocks.reshape(2, 3, factor**2, -1).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(shuffle_pixels(features, factor), expected)
    assert shuffle_pixels(features[:0], factor).shape == (0, *expected.shape[1:])


def test_factor_1_needs_no_grid():
    check_pixel_shuffle(1, 728)


@pytest.mark.parametrize(
    ("factor", "patches", "said"),
    [
        (2, 729, "27 × 27 patches; give one of 1, 3, 9, 27"),
        (3, 256, "give one of 1, 2, 4, 8, 16"),
        (2, 728, "728 tokens, which are no square grid"),
        (0, 256, "give one of 1, 2, 4, 8, 16"),
        (-2, 256, "give one of 1, 2, 4, 8, 16"),
        (32, 256, "give one of 1, 2, 4, 8, 16"),
    ],
)
def test_factors_that_do_not_fit(factor, patches, said):
    with pytest.raises(ValueError, match=f"--pixel_shuffle {factor}: .*{said}"):
        check_pixel_shuffle(factor, patches)


# ---- The model


@pytest.mark.parametrize("make_tower", [make_clip_checkpoint, make_siglip_checkpoint])
def test_the_model_has_fewer_tokens_and_a_wider_projector(tiny_bases, tmp_path, make_tower):
    model = shuffled_model(tiny_bases[0], make_tower(tmp_path / "tower", image_size=84))  # a grid of 6 × 6
    assert (model.pixel_shuffle, model.vision_tower.num_image_tokens, model.num_image_tokens) == (2, 36, 9)
    shapes = {name: tuple(value.shape) for name, value in model.projector.state_dict().items()}
    assert shapes == {"0.weight": (16, 4 * W), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    features = model.vision_tower(pixels(2, 84))  # (2, 36, W)
    by_hand = torch.cat([features[:, [2, 3, 8, 9]].flatten(1)], dim=1)  # the second token: rows 0, 1 of columns 2, 3
    encoded = model.encode_images(pixels(2, 84))
    assert encoded.shape == (2, 9, 16)
    torch.testing.assert_close(encoded[:, 1], model.projector(by_hand))
    assert torch.equal(model.encode_images(None, features), encoded)
    with pytest.raises(ValueError, match=r"\(N, 36, 32\), got \(2, 9, 128\)"):
        model.encode_images(None, shuffle_pixels(features, 2))


def test_gradients_reach_all_of_the_projector_and_image_tokens_are_counted(tiny_bases):
    model = shuffled_model(*tiny_bases)
    ids = torch.tensor([[5, model.qwen.image_token_id, 6, 7]])
    labels = torch.tensor([[-100, -100, 6, 7]])
    model(ids, labels=labels, pixel_values=pixels(1), return_logits=False).loss.backward()
    first = model.projector[0].weight.grad  # (D, 4 · W)
    assert (first.abs().sum(0) > 0).all(), "every channel of every patch"
    with pytest.raises(ValueError, match="hold 4 image tokens"):
        model(torch.full((1, 4), model.qwen.image_token_id), pixel_values=pixels(1))


def test_what_is_loaded_is_what_was_saved(tiny_bases, tmp_path):
    model = shuffled_model(*tiny_bases)
    model.save_checkpoint(tmp_path)
    note = json.loads((tmp_path / NOTE).read_text())
    assert (note["pixel_shuffle"], note["num_image_tokens"], note["vision_hidden_size"]) == (2, 1, W)
    again = VisionLanguageModel.from_pretrained(model_weights=tmp_path, device="cpu", pixel_shuffle=1)
    assert (again.pixel_shuffle, again.num_image_tokens) == (2, 1), "a checkpoint's own factor rules"
    assert all(torch.equal(value, again.projector.state_dict()[k]) for k, value in model.projector.state_dict().items())
    torch.testing.assert_close(again.encode_images(pixels()), model.encode_images(pixels()))
    model.load_checkpoint(tmp_path)
    other = VisionLanguageModel.from_pretrained(*tiny_bases, device="cpu")
    other.add_lora(LoraSettings(rank=4, alpha=8))
    with pytest.raises(CheckpointError, match="pixel_shuffle 2, the model has 1"):
        other.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "pixel_shuffle must be at least 1, got 0"),
        ("2", "pixel_shuffle must be a int, got '2'"),
        (4, "num_image_tokens is 0, the checkpoint was trained with 1"),
        (10**9, "num_image_tokens is 0"),
    ],
)
def test_a_wrong_factor_in_a_checkpoint(tiny_bases, tmp_path, value, said):
    shuffled_model(*tiny_bases).save_checkpoint(tmp_path)
    note = json.loads((tmp_path / NOTE).read_text())
    (tmp_path / NOTE).write_text(json.dumps({**note, "pixel_shuffle": value}))
    write_checksums(tmp_path, [NOTE])
    with pytest.raises(CheckpointError, match=said):
        VisionLanguageModel.from_pretrained(model_weights=tmp_path, device="cpu")


# ---- Training


def test_a_run_resumes_to_the_bit_and_not_with_another_factor(whole, command, tmp_path, capsys):
    assert load_file(whole / "projector.safetensors")["0.weight"].shape[1] == 4 * W
    ignore = shutil.ignore_patterns("checkpoint-6", "*.safetensors")
    run = shutil.copytree(whole, tmp_path / "run", ignore=lambda d, n: ignore(d, n) if d == str(whole) else set())
    resume = ["--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    assert train.main([*command[:-2], *resume]) == 2
    assert "pixel_shuffle was 2 and is now 1" in one_line_error(capsys.readouterr().err, "train.py")
    assert train.main([*command, *resume]) == 0
    assert losses(run / "checkpoint-6") == losses(whole / "checkpoint-6")
    ours, theirs = trained_weights(run), trained_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_factor_1_is_as_without_the_flag(command, tmp_path):
    for name, flags in (("off", ["--pixel_shuffle", "1"]), ("absent", [])):
        assert train.main([*command[:-2], *flags, "--max_steps", "3", "--output_dir", str(tmp_path / name)]) == 0
    files = [(tmp_path / name / NOTE).read_bytes() for name in ("off", "absent")]
    assert files[0] == files[1]
    assert b"pixel_shuffle" not in files[0]
    states = [json.loads((tmp_path / name / "checkpoint-3/run_state.json").read_text()) for name in ("off", "absent")]
    assert states[0] == states[1]
    assert "pixel_shuffle" not in states[0]["identity"]


def test_the_feature_cache_is_shared_between_factors(whole, command, tmp_path):
    cache = ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]
    assert train.main([*command[:-2], *cache, "--max_steps", "1", "--output_dir", str(tmp_path / "off")]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert train.main([*command, *cache, "--output_dir", str(tmp_path / "on")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert losses(tmp_path / "on/checkpoint-6") == losses(whole / "checkpoint-6")


def test_previous_weights_bring_their_factor(whole, command, tmp_path, capsys):
    previous = ["--previous_lora_weights", str(whole), "--max_steps", "1"]
    still = [*previous, "--learning_rate", "0", "--feature_proj_lr", "0"]
    assert train.main([*command[:-2], *still, "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / NOTE).read_text())["pixel_shuffle"] == 2
    ours, theirs = trained_weights(tmp_path / "run"), trained_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for dry in ([], ["--dry_run"]):
        argv = [*command[:-1], "1", *previous, *dry, "--output_dir", str(tmp_path / "out")]
        assert train.main(argv) == 2
        message = one_line_error(capsys.readouterr().err, "train.py")
        assert "--pixel_shuffle 1 disagrees with --previous_lora_weights" in message
        assert message.endswith(" 2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(("value", "said"), [("3", "2 × 2 patches; give one of 1, 2"), ("0", "must be at least 1")])
def test_factors_that_no_run_can_have(command, tmp_path, capsys, value, said, dry):
    assert train.main([*command[:-1], value, *dry, "--output_dir", str(tmp_path / "out")]) == 2
    message = one_line_error(capsys.readouterr().err, "train.py")
    assert f"--pixel_shuffle {value}: " in message
    assert said in message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dry_run_says_what_it_saves(command, tmp_path, capsys):
    assert train.main([*command, "--dry_run", "--feature_cache", str(tmp_path / "cache")]) == 0
    shuffled = capsys.readouterr().out
    assert train.main([*command[:-2], "--dry_run"]) == 0
    plain = capsys.readouterr().out
    assert "pixel shuffle 2: an image takes 1 tokens, without it 4" in shuffled
    assert "pixel shuffle" not in plain

    def row(text: str, name: str) -> list[str]:
        return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()

    peak = "most at one moment"
    line = next(line for line in shuffled.splitlines() if line.startswith("CPU fp32: "))
    assert line == f"CPU fp32: {row(shuffled, peak)[0]} GB at the most, without it {row(plain, peak)[0]} GB"
    assert row(shuffled, "of images")[-1] == "2"
    assert row(plain, "of images")[-1] == "8"
    extra = 3 * W * 16  # of the projector's first layer
    projectors = [int(row(text, "projector")[0].replace(",", "")) for text in (shuffled, plain)]
    assert projectors[0] - projectors[1] == extra
    assert "4 × 32 bfloat16 each" in shuffled, "the cache holds what the tower gives"


def test_a_dry_run_says_where_only_pixel_shuffle_lets_a_sample_fit(base_flags, tmp_path, pictures, capsys):
    data = write_data(tmp_path / "data", [("red.png", ("<|extra_0|>?", "Yes"))], pictures["red"].parent)
    dry = [*base_flags, *data, *QUICK, "--pixel_shuffle", "2", "--dry_run"]
    assert train.main(dry) == 0
    lengths = capsys.readouterr().out.split("tokens per sample")[1].splitlines()[1]  # all: least, mean, most
    tokens = lengths.split()[-1]
    assert train.main([*dry, "--max_length", tokens]) == 0
    assert "without it 4, and no sample would fit" in capsys.readouterr().out


# ---- Asking


def test_answers_come_from_the_joined_patches(whole, pictures, capsys):
    ask = load_test_py().main
    flags = ["--model_weights", str(whole), "--image_path", str(pictures["red"]), "--prompt", "What?", "--greedy"]
    assert ask(flags) == 0
    answer = capsys.readouterr().out
    model = VisionLanguageModel.from_pretrained(model_weights=whole, device="cpu")
    tokenizer = load_tokenizer(model.base_language_model)
    ids = torch.tensor([encode_prompt(tokenizer, "<|extra_0|>What?", 1)[0]])  # one token for the image
    from dataset import load_image

    image = model.vision_tower.image_transform(load_image(pictures["red"]))[None]
    out = model.generate(ids, pixel_values=image, do_sample=False, max_new_tokens=8, top_p=None, top_k=None)
    assert tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True).strip() == answer.strip()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_other_language_models_too(family, data, tmp_path, pictures, capsys):
    bases = make_family(tmp_path / family, family), make_clip_checkpoint(tmp_path / "clip")
    flags = ["--base_language_model", bases[0], "--base_value_model", bases[1], *data, *QUICK, "--pixel_shuffle", "2"]
    assert train.main([*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    model = VisionLanguageModel.from_pretrained(model_weights=tmp_path / "run", device="cpu")
    assert (model.num_image_tokens, model.projector[0].in_features) == (1, 4 * W)
    capsys.readouterr()
    ask = ["--model_weights", str(tmp_path / "run"), "--image_path", str(pictures["red"]), "--prompt", "What?"]
    assert load_test_py().main([*ask, "--greedy"]) == 0
    capsys.readouterr()
