"""The start-up hook: present, harmless, and enough for the stock lm_eval."""

import subprocess
import sys

import pytest


def python(code: str, **env: str) -> str:
    import os

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return run.stdout.strip()


FINDER = "import sys; print([type(f).__name__ for f in sys.meta_path].count('_Finder'), len({'torch', 'lm_eval', 'memdec'} & set(sys.modules)))"


def test_the_interpreter_starts_with_the_finder_and_nothing_else() -> None:
    assert python(FINDER) == "1 0"


def test_it_can_be_switched_off() -> None:
    assert python(FINDER, MEMDEC_NO_HOOK="1") == "0 0"


@pytest.mark.parametrize("include", ["None", "str(extra)", "extra", "[str(extra)]"])
def test_the_task_folder_is_added_whatever_else_is_given(
    include: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    import lm_eval.tasks.manager as manager
    from lm_eval.tasks._index import TaskIndex

    extra = Path(str(tmp_path))
    (extra / "x.yaml").write_text("task: x_of_the_user\noutput_type: loglikelihood\n")
    seen: list[str] = []
    build = TaskIndex.build
    # lm-eval's own 14,000 files take seconds to index: leave them out here.
    own = Path(manager.__file__).parent
    monkeypatch.setattr(
        TaskIndex,
        "build",
        staticmethod(lambda paths: seen.extend(map(str, paths)) or build([p for p in paths if p != own])),
    )
    tasks = manager.TaskManager(include_path=eval(include, {"extra": extra}))
    assert {"memdec_ppl", "memdec_wikitext", "pubmedqa"} <= set(tasks.all_tasks)
    assert ("x_of_the_user" in tasks.all_tasks) == (include != "None")
    assert "harness_tasks" in str(tasks.task_index["pubmedqa"].yaml_path)
    assert str(own) in seen
    assert not manager.TaskManager(include_defaults=False).all_tasks


def test_the_models_are_registered_by_name_and_by_entry_point() -> None:
    from importlib.metadata import entry_points

    from lm_eval.api.registry import get_model

    from memdec.harness.baselines import MemDecIcRag, MemDecKnnLM
    from memdec.harness.models import MemDecInterp

    models = {"memdec-interp": MemDecInterp, "memdec-knnlm": MemDecKnnLM, "memdec-icrag": MemDecIcRag}
    for name, model in models.items():
        assert get_model(name) is model
    found = {e.name: e for e in entry_points(group="lm_eval.models") if e.name in models}
    assert {name: entry.load() for name, entry in found.items()} == models
