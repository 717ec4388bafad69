"""The losses of one router, by hand: 2 experts, the best 1."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cpgd.policy.router_balance import AddedLoss, RouterTokens, sequence_aux_loss, z_loss

SHARES = torch.tensor([[0.75, 0.25], [0.9, 0.1], [0.25, 0.75], [0.25, 0.75]])
"""Of 4 tokens; the second one is padding."""
TOKENS = RouterTokens(
    real=torch.tensor([True, False, True, True]),
    sequence=torch.tensor([0, 0, 0, 1]),
    lengths=torch.tensor([2.0, 1.0]),
)


@pytest.mark.parametrize(
    ("score_function", "logits"),
    [("softmax", SHARES.log() + 7), ("sigmoid", (0.8 * SHARES).logit())],  # in sum 1, or 0.8
)
def test_the_auxiliary_loss_of_each_sequence_is_1_if_balanced_and_2_p_if_not(
    score_function, logits
):
    alone = SimpleNamespace(size=lambda: 1)
    loss = sequence_aux_loss(logits, TOKENS, top_k=1, score_function=score_function, group=alone)
    # The first: f = 1, 1, P = 0.5, 0.5. The second: f = 0, 2, P = 0.25, 0.75.
    assert loss.item() == pytest.approx(1 + 1.5)


def test_the_z_loss_is_the_square_of_what_the_softmax_takes_away():
    logits = SHARES.log() + torch.tensor([[1.0], [100.0], [2.0], [-3.0]])
    assert z_loss(logits, TOKENS).item() == pytest.approx(1 + 4 + 9)


def test_an_added_loss_adds_its_gradient_and_changes_no_value():
    logits = SHARES.clone().requires_grad_()
    same = AddedLoss.apply(logits, logits.square().sum())
    assert torch.equal(same, SHARES)
    (3 * same).sum().backward()
    assert torch.equal(logits.grad, 3 + 2 * SHARES)
