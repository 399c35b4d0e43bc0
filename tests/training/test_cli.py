import inspect
import re
import subprocess
import sys

import pytest

from minivla.checkpoints import POLICIES
from minivla.training import train
from minivla.training.__main__ import HELP, _matching_env, main, make_policy
from minivla.training.spec import literal, parse_spec

TABLETOP = "tabletop:pick_place?episodes=2&seed=0&cameras=table&size=32"


@pytest.fixture(autouse=True)
def _tiny_is_a_type(monkeypatch):
    monkeypatch.setitem(POLICIES, "tiny", "tests.training.tiny:Tiny")


def cameras_off(data):
    return data.replace("cameras=table", "cameras=()")


def test_every_option_of_train_has_a_flag_and_a_help():
    options = {n for n, p in inspect.signature(train).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options == set(HELP)


def test_help_is_readable(capsys):
    for words in (["--help"], ["evaluate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--warmup-steps" in text
    assert re.search(r"--batch-size X\s+samples a step, on each process \(default: 64\)", text)
    assert 'python -m minivla.training --policy act --data "tabletop:pick_place?episodes=600&seed=0"' in text


def test_training_and_evaluating_from_the_command_line(tmp_path, capsys):
    data = cameras_off(TABLETOP)
    words = [
        "--policy",
        "tiny",
        "--data",
        data,
        "--set",
        "chunk_size=3",
        "--set",
        "optimizer_lr=1e-3",
        "--steps",
        "3",
    ]
    words += [
        "--batch-size",
        "4",
        "--eval-every",
        "3",
        "--eval-episodes",
        "2",
        "--save-every",
        "2",
        "--ema",
        "0.9",
    ]
    words += ["--output", str(tmp_path / "run"), "--no-progress", "--device", "cpu", "--log-every", "1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"total\s+[\d,]+\s+[\d,]+\s+0\n", shown)
    assert re.search(r"3 steps, loss .* success \d\.\d+ \[", shown)

    folder = str(tmp_path / "run" / "checkpoints" / "last" / "pretrained_model")
    env = "tabletop:pick_place?cameras=()&size=32"
    assert (
        main(
            [
                "evaluate",
                "--policy",
                folder,
                "--env",
                env,
                "--episodes",
                "2",
                "--no-progress",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert re.fullmatch(r"\d\.\d{3} \[.*\] over 2 episodes.*\n", capsys.readouterr().out)

    again = ["--policy", folder, "--data", data, "--steps", "1", "--no-progress", "--device", "cpu"]
    assert main(again) == 0  # a checkpoint to start from


def test_settings_of_the_config_are_checked():
    with pytest.raises(ValueError, match=r"no field 'chunk_sise' \(did you mean 'chunk_size'\?\)"):
        make_policy("tiny", cameras_off(TABLETOP), {"chunk_sise": 3}, "cpu")
    with pytest.raises(ValueError, match="--set chunk_size; expected KEY=VALUE"):
        main(["--policy", "tiny", "--data", TABLETOP, "--steps", "1", "--set", "chunk_size"])


def test_evaluation_follows_the_demonstrations():
    assert _matching_env(TABLETOP) == "tabletop:pick_place?cameras=table&size=32"
    assert _matching_env("tabletop:reach?split=test&seed=1") == "tabletop:reach?split=test"
    assert _matching_env("tabletop:push?episodes=3") == "tabletop:push"
    with pytest.raises(ValueError, match="needs --eval-env"):
        _matching_env("lerobot/pusht")


def test_words_of_the_command_line():
    words = ["3", "-1.5", "false", "None", "a,b", "1,2", "runs/a", "(1, 2)"]
    assert [literal(w) for w in words] == [3, -1.5, False, None, ("a", "b"), (1, 2), "runs/a", (1, 2)]


def test_names_with_arguments():
    assert parse_spec("a:b") == ("a:b", {})
    assert parse_spec("a?cameras=table&x=1")[1] == {"cameras": ("table",), "x": 1}
    assert parse_spec("a?cameras=table,wrist")[1] == {"cameras": ("table", "wrist")}
    assert parse_spec("a?cameras=")[1] == parse_spec("a?cameras=()")[1] == {"cameras": ()}
    with pytest.raises(ValueError, match=r"'a\?size': expected NAME\?key=value"):
        parse_spec("a?size")


@pytest.mark.slow
def test_accelerate_launch_takes_it_to_two_processes(tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += (
        " --mixed_precision no --dynamo_backend no -m minivla.training --no-progress --steps 2 --batch-size 2"
    )
    small = [
        "chunk_size=4",
        "n_action_steps=4",
        "dim_model=16",
        "n_heads=2",
        "dim_feedforward=16",
        "n_encoder_layers=1",
    ]
    words = launch.split() + [word for field in small for word in ("--set", field)]
    words += ["--set", "pretrained_backbone_weights=none", "--policy", "act", "--data", TABLETOP]
    words += ["--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "000002" / "pretrained_model" / "config.json").exists()
    assert done.stdout.count("2 steps, loss") == 1
