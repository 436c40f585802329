"""The published pipelines of random weights that the tests of models share."""

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{"sd35", "", "edit", "plus": the folder of an SD3.5, and of a Qwen-Image that draws or edits}. Read only."""
    from tests.helpers import qwen_hub, sd3

    root = tmp_path_factory.mktemp("hub")
    made = {"sd35": sd3.build_sd35(root / "sd35")}
    return made | {kind: qwen_hub.build_qwen(root / name, kind) for kind, name in qwen_hub.PIPELINES.items()}
