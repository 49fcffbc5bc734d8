"""A tiny Llama trained on both backends: the loss curves agree."""

import pytest
import torch

# a machine that only runs the kernels may have an older one
peft = pytest.importorskip("peft", minversion="0.21")

from hycam import HyCAMConfig
from tests.models import tiny_model

STEPS = 30


def loss_curve(backend: str, device: torch.device) -> list[float]:
    torch.manual_seed(0)
    config = HyCAMConfig(r=8, num_experts=3, backend=backend)
    model = peft.get_peft_model(tiny_model("llama"), config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_loss_curves_of_both_backends_agree(device):
    got, want = loss_curve("triton", device), loss_curve("torch", device)
    assert want[-1] < 0.8 * want[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-3)
