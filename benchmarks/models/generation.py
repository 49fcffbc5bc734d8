"""What an adapter costs in generation: whole `generate` calls, and one token's forward on a static cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.harness.timing import Work
from benchmarks.models.backbones import ModelShape
from benchmarks.models.methods import HYCAM
from benchmarks.models.training import adapted, base_model, token_ids
from benchmarks.op.checks import compare, results
from benchmarks.op.peers import Arguments, Outputs
from hycam.adapter.discovery import CACHE


class Generation:
    """A model under a method ("frozen": bare) that continues prompts greedily.

    Args:
        shape: ``batch`` prompts of ``length`` tokens.
        new_tokens: that each prompt is continued by.
    """

    def __init__(self, name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, new_tokens: int) -> None:
        self.model: Any = adapted(name, shape, dtype, device).eval()
        self.prompts = [token_ids(shape, device, seed) for seed in range(2)]
        self.new_tokens = new_tokens
        base_model(self.model).generation_config.eos_token_id = None

    def run(self, index: int) -> Tensor:
        ids = self.prompts[index]
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new_tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    def work(self) -> Work:
        """Whole calls of `generate`."""
        return Work(lambda index: index, self.run, len(self.prompts))

    def token_work(self) -> Work:
        """One token's forward at the prompt's end. No step of it waits for the device: a CUDA graph can hold it."""
        prompt = self.prompts[0]
        cache = StaticCache(config=base_model(self.model).config, max_cache_len=prompt.shape[1] + self.new_tokens)
        with torch.no_grad():
            self.model(input_ids=prompt, use_cache=True, **{CACHE: cache})
        token = prompt[:, :1].clone()

        def setup(index: int) -> Tensor:
            # each forward moves the cache on; a graph that is replayed would leave it
            layers: list[Any] = cache.layers
            for layer in layers:
                layer.cumulative_length.fill_(prompt.shape[1])
            return token

        @torch.no_grad()
        def run(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits

        return Work(setup, run, 1, on_device=True)


def check_generation(name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the logits after a prompt and after one more, cached token with the reference's in float64.

    On two layers of the backbone's width.

    Raises:
        WrongResultError: as `checks.compare`.
    """
    cut = shape.cut()
    eager = "hycam-eager" if name in HYCAM else name

    def run(method: str, computed_in: torch.dtype) -> dict[str, Tensor]:
        model: Any = adapted(method, cut, dtype, device).eval().to(computed_in)

        def call(arguments: Arguments) -> Outputs:
            ids = arguments["ids"]
            prompt = model(input_ids=ids[:, :-1], use_cache=True)
            token = model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: prompt[CACHE]})
            return prompt.logits[:, -1], token.logits[:, -1]

        return results(call, {"ids": token_ids(cut, device)}, inference=True)

    compare(name, run(name, dtype), run(eager, torch.float64), run(eager, dtype))
