"""What README and docs/weights.md tell a user to type, typed in an empty folder, with a Hub on loopback."""

import re
import shlex

import pytest
import torch
from hub_server import WRITER
from official import official, training_checkpoint

GUIDES = {
    "README.md": ("eca_resnet50", "eca_resnet50_k3557.pth.tar"),
    "docs/weights.md": ("eca_mobilenetv2_100", "mobilenetv2.pth.tar"),
}


def section(text, title):
    return text[text.index(title) :].partition("\n## ")[0]


def commands(text):
    """What its code blocks run, in order: (arguments of timm-eca, Python code, variables set by then)."""
    env = {}
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            yield None, code, env
            continue
        for line in code.splitlines():
            command, *arguments = shlex.split(line, comments=True)
            if command == "export":
                env = env | dict([arguments[0].split("=")])
            elif command == "python":
                yield None, arguments[1], env
            else:
                assert command == "timm-eca"
                yield arguments, None, env


@pytest.mark.parametrize("guide", GUIDES)
def test_commands(guide, server, client, repository, tmp_path):
    name, file = GUIDES[guide]
    folder = tmp_path / "empty"
    folder.mkdir()
    torch.save(training_checkpoint(official(name)), folder / file)
    text = (repository / guide).read_text()
    user = client()
    for arguments, code, env in commands(section(text, "## Weights in Hub") if guide == "README.md" else text):
        env = env | {"HF_TOKEN": WRITER}
        result = user.command(*arguments, cwd=folder, **env) if arguments else user.spawn(code, env, folder).wait()
        assert result[0] == 0, (arguments or code, result)
    repo = server.repos[f"my-org/{name}.ecanet_in1k"]
    assert len(repo.commits) == 2
    assert repo.private == ("docs" in guide)
    assert "Released file" in server.files(f"my-org/{name}.ecanet_in1k")["README.md"].decode()
