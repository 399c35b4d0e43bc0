"""The paths are the decoded chunks', the probabilities those the codes were drawn with."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import minivla
import minivla.world
from minivla.data.features import features_of
from minivla.data.windows import delta_timestamps
from minivla.policies.vqbet import VQBeT, VQBeTConfig
from minivla.viz import Plane, codebook, palette, plot_choice, plot_codebook
from minivla.viz.codebook import by_direction, robot_chunks

SPEC = minivla.world.EMBODIMENTS["cartesian"].action_spec
TINY = {
    "n_obs_steps": 2,
    "action_chunk_size": 4,
    "crop_shape": None,
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 4,
    "n_vqvae_training_steps": 4,
    "vqvae_n_embed": 6,
    "vqvae_embedding_dim": 8,
    "vqvae_enc_hidden_dim": 16,
    "vqvae_kmeans_init": True,
    "gpt_block_size": 16,
    "gpt_input_dim": 16,
    "gpt_output_dim": 16,
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 16,
    "several_cameras": True,
    "compact_vision": True,
    "bet_softmax_temperature": 0.5,
}
CODES = 6


def made(dataset, stats=True, **settings):
    inputs, outputs = features_of(dataset)
    torch.manual_seed(0)
    config = VQBeTConfig(input_features=inputs, output_features=outputs, **TINY | settings)
    return VQBeT(config, stats=dataset.stats if stats else None)


def after_phase_one(dataset, **settings):
    """A policy whose codes were made from the data set's chunks, and these."""
    policy = made(dataset, **settings)
    windows = dataset.windows(delta_timestamps(policy.config, dataset.fps))
    items = windows.__getitems__(range(0, len(windows), 3))
    actions = torch.cat([policy.preprocess(item)["action"] for item in items])
    chunks = actions.unfold(1, 4, 1).transpose(-1, -2).flatten(0, 1)
    policy.train()
    for _ in range(policy.config.n_vqvae_training_steps):
        policy.vqvae(chunks)
    policy.vqvae.finish()
    return policy.eval(), chunks, windows


@pytest.fixture(scope="module")
def seen():
    """policy, codes of the data set, a traced call of two samples."""
    dataset = minivla.world.demonstrations("pick_place", 2, 0)
    policy, chunks, windows = after_phase_one(dataset)
    items = windows.__getitems__([5, 40])
    batches = [policy.preprocess(item) for item in items]
    batch = {
        key: torch.cat([b[key] for b in batches]) if isinstance(value, torch.Tensor) else value
        for key, value in batches[0].items()
    }
    with minivla.trace(policy) as trace:
        policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    codes = policy.vqvae.encode(chunks)
    return SimpleNamespace(policy=policy, codes=codes, trace=trace, batch=batch, items=items, dataset=dataset)


def line(ax, gid):
    """The points of the line with that name."""
    return next(np.stack(found.get_data(), axis=1) for found in ax.lines if found.get_gid() == gid)


def by_code(figure):
    panels = (ax for ax in figure.axes if str(ax.get_gid()).startswith("code "))
    return {int(ax.get_gid().split()[1]): ax for ax in panels}


def steps(ax, name="path"):
    """Are the dots at the ends of the steps filled?"""
    dots = next(found for found in ax.collections if found.get_gid() == f"{name}, steps")
    return [to_hex(colour) != palette.PAPER.lower() for colour in dots.get_facecolors()]


def expected_path(chunk):
    """What Tabletop's Cartesian gripper would do with a chunk (H, 3), written out once more."""
    place, found = np.zeros(2), [np.zeros(2)]
    for action in chunk:
        place = place + 0.04 * np.clip(action[:2], -1, 1)
        found.append(place)
    return np.array(found)


def test_chunks_of_all_levels_are_the_decoders_and_of_the_first_alone_what_its_entry_gives(seen):
    policy = seen.policy
    pairs = torch.cartesian_prod(torch.arange(CODES), torch.arange(CODES))
    wanted = policy.postprocess(policy.vqvae.decode(pairs))
    np.testing.assert_allclose(robot_chunks(policy, pairs), wanted, rtol=1e-5, atol=1e-6)
    entries = policy.vqvae.vq_layer.levels[0].codebook
    wanted = policy.postprocess(policy.vqvae.decoder(entries).unflatten(-1, (4, 3))).detach()
    np.testing.assert_allclose(robot_chunks(policy, torch.arange(CODES)[:, None]), wanted, rtol=1e-5)


def test_each_code_is_drawn_as_the_path_it_decodes_to(seen):
    panels = by_code(plot_codebook(seen.policy, SPEC))
    chunks = robot_chunks(seen.policy, torch.arange(CODES)[:, None])
    assert sorted(panels) == list(range(CODES))
    for code, ax in panels.items():
        np.testing.assert_allclose(line(ax, "path"), expected_path(chunks[code]), atol=1e-6)
        assert steps(ax) == (chunks[code][:, 2] > 0).tolist()
    assert len({ax.get_xlim() + ax.get_ylim() for ax in panels.values()}) == 1, "one scale for all"


def test_names_of_the_dimensions_make_sums_and_nothing_the_first_two(seen):
    names = seen.dataset.features["action"]["names"]
    chunk = robot_chunks(seen.policy, torch.tensor([[2]]))[0]
    ax = by_code(plot_codebook(seen.policy, names))[2]
    np.testing.assert_allclose(line(ax, "path")[1:], chunk[:, :2].cumsum(axis=0), atol=1e-6)
    assert steps(ax) == (chunk[:, 2] > 0).tolist()
    ax = by_code(plot_codebook(seen.policy))[2]
    np.testing.assert_allclose(line(ax, "path")[1:], chunk[:, :2].cumsum(axis=0), atol=1e-6)
    assert steps(ax) == [True] * 4, "no gripper is known"
    ax = by_code(plot_codebook(seen.policy, Plane(x=1, y=2, absolute=True)))[2]
    np.testing.assert_allclose(line(ax, "path"), chunk[:, 1:], atol=1e-6)


def test_the_second_level_fans_out_round_the_first(seen):
    figure = plot_codebook(seen.policy, SPEC, refine=3)
    (fan,) = (ax for ax in figure.axes if ax.get_title(loc="left") == "Code 3 refined")
    for second in range(CODES):
        wanted = expected_path(robot_chunks(seen.policy, torch.tensor([[3, second]]))[0])
        np.testing.assert_allclose(line(fan, f"with {second}"), wanted, atol=1e-6)
    alone = robot_chunks(seen.policy, torch.tensor([[3]]))[0]
    np.testing.assert_allclose(line(fan, "level 1 alone"), expected_path(alone), atol=1e-6)
    fans = [ax.get_title(loc="left") for ax in plot_codebook(seen.policy, SPEC, refine=(1, 4)).axes[-2:]]
    assert fans == ["Code 1 refined", "Code 4 refined"]


def test_usage_is_written_and_dead_codes_are_grey(seen):
    codes = torch.tensor([[0, 1]] * 6 + [[2, 3]] * 3 + [[2, 4]] * 1)
    figure = plot_codebook(seen.policy, SPEC, codes=codes)
    panels = by_code(figure)
    told = {code: ax.texts[1].get_text() for code, ax in panels.items()}
    assert told == {0: "60 %", 1: "never", 2: "40 %", 3: "never", 4: "never", 5: "never"}
    grey = {code for code, ax in panels.items() if to_hex(ax.get_facecolor()) == "#dddddd"}
    assert grey == {1, 3, 4, 5}
    bars = {code: next(p for p in ax.patches if p.get_gid() == "use") for code, ax in panels.items()}
    assert [bars[code].get_width() for code in (0, 1, 2)] == pytest.approx([1, 0, 4 / 6])
    assert "4 never used" in figure.get_suptitle()
    fan = plot_codebook(seen.policy, SPEC, codes=codes, refine=2).axes[-1]
    looks = {lin.get_gid(): lin for lin in fan.lines if str(lin.get_gid()).startswith("with ")}
    assert looks["with 3"].get_linewidth() > looks["with 4"].get_linewidth()
    assert [gid for gid, lin in looks.items() if lin.get_linestyle() != "-"] and all(
        (lin.get_linestyle() == "-") == (gid in ("with 3", "with 4")) for gid, lin in looks.items()
    )


def test_codes_of_the_data_set_are_counted_as_they_are(seen):
    panels = by_code(plot_codebook(seen.policy, SPEC, codes=seen.codes))
    share = np.bincount(seen.codes[:, 0], minlength=CODES) / len(seen.codes)
    for code, ax in panels.items():
        wanted = (
            "never" if not share[code] else "< 1 %" if share[code] < 0.01 else f"{100 * share[code]:.0f} %"
        )
        assert ax.texts[1].get_text() == wanted


def test_codes_are_sorted_by_gripper_and_direction():
    ways = [(0, -1), (1, 0), (0.01, 0), (0, 1), (1, 0.1), (-1, 0)]
    paths = [np.array([(0, 0), way]) for way in ways]
    shut = [np.array([value]) for value in (False, False, False, False, True, False)]
    assert by_direction(paths, shut) == [1, 3, 5, 0, 2, 4]


def test_one_level_and_many_codes(seen, monkeypatch):
    policy, chunks, _ = after_phase_one(seen.dataset, vqvae_levels=1, vqvae_n_embed=12)
    assert len(plot_codebook(policy, SPEC, codes=policy.vqvae.encode(chunks)).axes) == 12
    monkeypatch.setattr(codebook, "MOST", 5)
    codes = torch.arange(12).repeat_interleave(torch.arange(12) ** 2 % 13)[:, None]
    figure = plot_codebook(policy, SPEC, codes=codes)
    uses = np.bincount(codes[:, 0], minlength=12)
    assert set(np.argsort(-uses, kind="stable")[:5]) == set(by_code(figure))
    assert figure.get_suptitle().startswith("5 of 12 codes")


def test_without_statistics_paths_are_normalised(seen):
    policy = made(seen.dataset, stats=False)
    policy.load_state_dict(seen.policy.state_dict())
    figure = plot_codebook(policy)
    chunk = policy.vqvae.decoder(policy.vqvae.vq_layer.levels[0].codebook[1]).detach().view(4, 3)
    np.testing.assert_allclose(line(by_code(figure)[1], "path")[1:], chunk[:, :2].cumsum(0), atol=1e-6)
    assert figure.axes[-1].get_xlabel() == "x (normalised)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 6}, "first level has 6 codes: expected one or two of 0 to 5"),
        ({"refine": [0, 1, 2]}, "expected one or two"),
        ({"codes": torch.zeros(4, 3, dtype=torch.long)}, r"shape \(4, 3\); expected \(..., 2\)"),
        ({"codes": torch.full((4, 2), 6)}, "between 6 and 6; expected 0 to 5"),
        ({"meaning": ["dx", "dy"]}, r"2 dimensions are named \(dx, dy\), .* action has 3"),
        ({"meaning": ["joint_1", "joint_2", "grip"]}, "none of the dimensions joint_1, joint_2, grip"),
        ({"meaning": Plane(gripper=3)}, r"dimensions \[0, 1, 3\] .* expected 0 to 2"),
    ],
)
def test_codebook_errors(seen, options, message):
    with pytest.raises(ValueError, match=message):
        plot_codebook(seen.policy, **options)


def test_policies_without_codes_and_untrained_ones_are_refused(seen):
    with pytest.raises(TypeError, match="Linear has no codes of actions"):
        plot_codebook(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"untrained: .* phase 1"):
        plot_codebook(made(seen.dataset))


def test_what_names_and_action_specs_mean():
    assert Plane.of(SPEC, 3) == Plane(0, 1, 2, 1, 0.04, False, "table widths")
    both = minivla.world.EMBODIMENTS["bimanual"].action_spec
    assert Plane.of(both, 6) == Plane.of(SPEC, 3), "the first arm"
    assert Plane.of(["gripper", "delta_y", "delta_x"], 3) == Plane(2, 1, 0)
    assert Plane.of(["target.x", "target.y"], 2) == Plane(0, 1, None, absolute=True)
    assert Plane.of(None, 7) == Plane()
    with pytest.raises(ValueError, match="action has 1: expected 0 to 0"):
        Plane.of(None, 1)
    assert Plane(gripper=2, closes=-1).closed(np.array([[0, 0, 1], [0, 0, -1]])).tolist() == [False, True]


@pytest.mark.parametrize(("sample", "query"), [(0, None), (1, None), (1, 3)])
def test_the_probabilities_are_those_of_the_draw(seen, sample, query):
    trace = seen.trace
    figure = trace.plot_codes(sample=sample, query=query, meaning=SPEC)
    place = 1 if query is None else query
    logits, codes = (trace.hidden[name][sample, place] for name in ("logits", "codes"))
    for level in range(2):
        ax = figure.axes[level]
        heights = [container.get_height() for container in ax.containers[0]]
        assert heights == pytest.approx((logits[level] / 0.5).softmax(-1).tolist(), rel=1e-5)
        (outline,) = (p for p in ax.patches if p.get_gid() == "at temperature 1")
        assert outline.get_data().values == pytest.approx(logits[level].softmax(-1).tolist(), rel=1e-5)
        strong = [to_hex(bar.get_facecolor()) == "#d55e00" for bar in ax.containers[0]]
        assert strong == [code == codes[level] for code in range(CODES)]
        assert ax.get_title(loc="left").startswith(f"level {level + 1}: {codes[level]} drawn, had ")


def test_paths_are_the_codes_and_the_chunk_and_arrows_lead_from_one_to_the_other(seen):
    trace, policy = seen.trace, seen.policy
    ax = trace.plot_codes(sample=1, meaning=SPEC).axes[-1]
    decoded = policy.postprocess(trace.hidden["decoded"][1, 1]).numpy()
    chunk = policy.postprocess(trace.chunk[1]).numpy()
    before, after = expected_path(decoded), expected_path(chunk)
    np.testing.assert_allclose(line(ax, "decoded"), before, atol=1e-6)
    np.testing.assert_allclose(line(ax, "chunk"), after, atol=1e-6)
    assert steps(ax, "chunk") == (chunk[:, 2] > 0).tolist()
    (arrows,) = (found for found in ax.collections if found.get_gid() == "offset")
    np.testing.assert_allclose(arrows.get_offsets(), before, atol=1e-6)
    np.testing.assert_allclose(np.stack((arrows.U, arrows.V), axis=1), after - before, atol=1e-6)
    moved = np.linalg.norm(after[-1] - before[-1])
    assert f"moves the end by {moved:.2g} table widths" in " ".join(ax.figure.get_suptitle().split())


def test_other_likely_codes_are_drawn_as_the_first_level_decodes_them(seen):
    ax = seen.trace.plot_codes(meaning=SPEC).axes[-1]
    chances = (seen.trace.hidden["logits"][0, 1, 0] / 0.5).softmax(-1)
    drawn = int(seen.trace.hidden["codes"][0, 1, 0])
    likely = [code for code in range(CODES) if chances[code] >= 0.02 and code != drawn]
    names = [lin.get_gid() for lin in ax.lines if str(lin.get_gid()).startswith("other ")]
    assert likely and names == [f"other {code}" for code in likely]
    chunk = robot_chunks(seen.policy, torch.tensor([[likely[0]]]))[0]
    np.testing.assert_allclose(line(ax, names[0]), expected_path(chunk), atol=1e-6)


def test_the_table_lies_under_the_gripper(seen):
    ax = seen.trace.plot_codes(sample=1, meaning=SPEC).axes[-1]
    (image,) = ax.images
    x, y = seen.items[1]["observation.state"][-1, :2].tolist()
    assert image.get_extent() == pytest.approx([-x, 1 - x, -y, 1 - y], abs=1e-5)
    picture = seen.items[1]["observation.images.table"][-1].movedim(0, -1)
    np.testing.assert_allclose(image.get_array(), picture, atol=1e-5)
    assert not seen.trace.plot_codes(meaning=SPEC, camera=None).axes[-1].images
    assert not seen.trace.plot_codes().axes[-1].images, "robot units are no places on the table"


def test_choice_errors(seen):
    with pytest.raises(ValueError, match="sample is 2; the call has 2"):
        seen.trace.plot_codes(sample=2)
    with pytest.raises(ValueError, match="query is 4; the call has 4"):
        seen.trace.plot_codes(query=4)
    policy = made(seen.dataset)
    with minivla.trace(policy) as trace:
        policy(seen.batch)
    with pytest.raises(ValueError, match=r"chose no codes; .* \(phase 1\)"):
        trace.plot_codes()
    policy = made(seen.dataset)
    with minivla.trace(policy) as trace, pytest.warns(UserWarning, match="not over"):
        policy.predict_action_chunk(seen.batch)
    with pytest.raises(ValueError, match="untrained"):
        trace.plot_codes()


def test_nothing_stays_open_or_changed(seen):
    before = dict(plt.rcParams)
    plot_choice(seen.policy, seen.trace.call())
    plot_codebook(seen.policy)
    assert dict(plt.rcParams) == before
