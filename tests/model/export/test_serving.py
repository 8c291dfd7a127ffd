"""Servers of other projects read an export; where they are not installed, these tests are skipped."""

from __future__ import annotations

import base64
import io
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from tiny_run import environment, free_port
from tiny_towers import make_clip_checkpoint, make_siglip_checkpoint

from dataset.prompt import encode_prompt
from model import VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer


def greedy_text(checkpoint, question: str, image: Image.Image | None) -> str:
    model = VisionLanguageModel.from_pretrained(model_weights=checkpoint, device="cpu")
    tokenizer = load_tokenizer(model.base_language_model)
    text = question if image is None else f"<|extra_0|>{question}"
    ids = torch.tensor([encode_prompt(tokenizer, text, model.num_image_tokens, system=tokenizer.default_system)[0]])
    pixels = None if image is None else model.vision_tower.image_transform(image)[None]
    stops = list(tokenizer.stop_ids)
    out = model.generate(ids, torch.ones_like(ids), pixels, do_sample=False, max_new_tokens=8, eos_token_id=stops)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "make_tower"),
    [("qwen", make_clip_checkpoint), ("qwen", make_siglip_checkpoint), ("qwen3", make_clip_checkpoint)],
    ids=["clip", "siglip", "qwen3 and clip"],
)
def test_transformers_serve_and_the_client_of_openai(
    export, make_checkpoint, make_family_checkpoint, tmp_path, family, make_tower
):
    openai = pytest.importorskip("openai")
    for package in ("fastapi", "uvicorn", "rich"):
        pytest.importorskip(package)
    checkpoint = make_checkpoint(make_tower) if family == "qwen" else make_family_checkpoint(family, vocab_size=300)
    folder = str(export(checkpoint))
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))  # not the tower's size
    png = io.BytesIO()
    image.save(png, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"

    port = free_port()
    words = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    (tmp_path / "home" / "hub").mkdir(parents=True)
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "transformers.cli.transformers", *words]
        env = environment(HF_HOME=str(tmp_path / "home"))
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:  # until it listens
            assert server.poll() is None, (tmp_path / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for question, picture in (("这幅图像描述了什么？", image), ("你好", None)):
            content = [{"type": "text", "text": question}]
            if picture is not None:
                content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
            ask = {
                "model": folder,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 8,
            }
            expected = greedy_text(checkpoint, question, picture)
            whole = client.chat.completions.create(**ask).choices[0].message.content
            streamed = [
                part.choices[0].delta.content or "" for part in client.chat.completions.create(**ask, stream=True)
            ]
            assert (whole, "".join(streamed)) == (expected, expected)
    finally:
        server.terminate()
        server.wait()
