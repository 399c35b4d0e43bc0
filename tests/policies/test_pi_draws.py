"""Several draws of noise for one look: the loss and its gradient are those of the observations repeated."""

import pytest
import torch

from minivla.data import FeatureType, PolicyFeature
from minivla.policies.pi import PI0, PI05, PI0Config, PI05Config

STREAM = {"width": 16, "layers": 3, "mlp": 24, "heads": 2, "kv_heads": 1, "head_dim": 8}
DRAWS, B, H = 3, 2, 4


def policy(kind, config, draws):
    torch.manual_seed(0)
    return kind(
        config(
            input_features={
                "observation.images.table": PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
                "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
            image_resolution=(16, 16), compact_vision=True, vision_size={"width": 16, "image_size": 16},
            language_size=STREAM, expert_size=STREAM, vocab_size=11, max_state_dim=3, max_action_dim=3,
            chunk_size=H, n_action_steps=H, noise_draws=draws,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), [(PI0, PI0Config), (PI05, PI05Config)])
def test_draws_are_repeated_observations(kind, config):
    many, one = policy(kind, config, DRAWS), policy(kind, config, 1)
    batch = {
        "observation.images.table": torch.rand(B, 3, 16, 16),
        "observation.state": torch.randn(B, 3),
        "observation.language.tokens": torch.randint(11, (B, 5)),
        "observation.language.attention_mask": torch.arange(5) < torch.tensor([[5], [3]]),
        "action": torch.randn(B, H, 3),
    }
    noise, time = torch.randn(B * DRAWS, H, 3), torch.rand(B * DRAWS)
    loss, _ = many(batch, noise=noise, time=time)
    again, _ = one(
        {key: x.repeat_interleave(DRAWS, dim=0) for key, x in batch.items()}, noise=noise, time=time
    )
    torch.testing.assert_close(loss, again)
    loss.backward()
    again.backward()
    for (name, a), b in zip(many.named_parameters(), one.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(
                a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_drawn_here_there_are_as_many():
    many = policy(PI0, PI0Config, DRAWS)
    assert many.config.unusual()["noise_draws"] == DRAWS
