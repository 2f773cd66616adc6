"""The notebooks of examples/: each runs at small size in a real kernel, and trainers show the table that they should.

All of them run in one kernel, one after the other, since its imports take longer than everything else. Commands
(`!hf-rlhf …`) run in the kernel's process for the same reason.
"""

import html
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_rlhf_ext.training.table import readable

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]

COMMANDS_IN_PROCESS = """
import contextlib, io, shlex, sys

def run_in_process(command):
    command = get_ipython().var_expand(command)
    before, _, after = command.rpartition("|")
    words = shlex.split(after)
    assert words[0] == "hf-rlhf", command
    question = shlex.split(before)[1] if before else ""
    from hf_rlhf_ext.cli.main import main
    stdin, sys.stdin = sys.stdin, io.StringIO(question + "\\n")
    try:
        main(words[1:])
    except SystemExit as end:
        assert not end.code, (command, end.code)
    finally:
        sys.stdin = stdin

get_ipython().system = run_in_process
"""

PRINT_LOG = "import json\nprint('LOG', json.dumps(trainer.state.log_history))"

INTERRUPTED = """
from transformers import TrainerCallback

class Interrupt(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt

trainer = new_trainer()
trainer.add_callback(Interrupt())
try:
    trainer.train()
except KeyboardInterrupt:
    print("interrupted")
"""

FURTHER_CELLS = {
    "ppo_with_a_function": {
        "interrupted": INTERRUPTED,
        "evaluated": "from hf_rlhf_ext.training import bars\nbars.DELAY = 0.0\nmetrics = trainer.evaluate()",
        "runtime": "print(sorted(name for name in metrics if name.endswith('runtime')))",
        "resumed": "trainer = new_trainer()\n_ = trainer.train(resume_from_checkpoint=True)",
    }
}
"""Cells that run before the last one, which frees the memory."""


def of(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)


def tiny_model(folder: Path, tokenizer) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def executed(tmp_path_factory, chat_tokenizer_factory) -> dict[str, list[dict]]:
    """The outputs of each cell, by its id, after all notebooks have run."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell(COMMANDS_IN_PROCESS)]
    for name in NAMES:
        (folder / name).mkdir()
        cells.append(nbformat.v4.new_code_cell(f"import os\nos.chdir({str(folder / name)!r})"))
        *first, last = of(name).cells
        further = FURTHER_CELLS.get(name, {})
        if name != "pipeline":
            further = {f"{name}-log": PRINT_LOG} | further
        cells += [*first, *(nbformat.v4.new_code_cell(text, id=key) for key, text in further.items()), last]
    together = nbformat.v4.new_notebook(cells=cells)

    environment = os.environ | {
        "RLHF_NOTEBOOK_SIZE": "small",
        "RLHF_NOTEBOOK_MODEL": tiny_model(folder / "model", chat_tokenizer_factory()),
        "HF_HUB_OFFLINE": "1",
    }
    client = NotebookClient(together, timeout=300, kernel_name="python3")
    client.execute(env=environment, cwd=str(folder))
    return {cell.id: cell.outputs for cell in together.cells if cell.cell_type == "code"}


def tables(outputs: list[dict]) -> list[list[dict[str, str]]]:
    """The tables among the outputs of a cell: their rows, by heading."""
    found = []
    for output in outputs:
        page = output.get("data", {}).get("text/html", "")
        headings = [html.unescape(text) for text in re.findall(r"<th>(.*?)</th>", page)]
        if not headings or headings[0] != "Step":
            continue
        rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page)]
        found.append([dict(zip(headings, row, strict=True)) for row in rows])
    return found


def text_of(outputs: list[dict], name: str = "stdout") -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


def log_of(executed: dict[str, list[dict]], name: str) -> list[dict]:
    return json.loads(text_of(executed[f"{name}-log"]).partition("LOG ")[2])


def table_of_training(executed: dict[str, list[dict]], name: str) -> list[dict[str, str]]:
    cell = next(cell.id for cell in of(name).cells if "trainer.train()" in cell.source and cell.cell_type == "code")
    (table,) = tables(executed[cell])
    return table


# ---- The files ----


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs_and_names_no_machine(name):
    notebook = of(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert not re.search(r"/(home|root|work|tmp|Users)/", cell.source)
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_parameters_and_says_how_to_run_it_on_a_hosted_gpu(name):
    notebook = of(name)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert "SIZE" in parameters.source and "MODEL" in parameters.source
    text = " ".join(cell.source for cell in notebook.cells)
    assert all(word in text for word in ("Colab", "Kaggle", "Internet", "T4", "fp16", "not on PyPI yet"))
    first_code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install" in first_code.source


def test_there_are_three_and_the_page_links_each():
    page = (ROOT / "docs" / "how_to" / "notebooks.md").read_text(encoding="utf-8")
    assert NAMES == ["pipeline", "ppo_with_a_function", "reward_model"]
    assert all(f"examples/notebooks/{name}.ipynb" in page for name in NAMES)


# ---- What they show ----


def test_ppo_shows_reward_kl_and_length_with_the_numbers_of_the_log(executed):
    table = table_of_training(executed, "ppo_with_a_function")
    training = [log for log in log_of(executed, "ppo_with_a_function") if "loss" in log]
    assert [row["Step"] for row in table] == [str(log["step"]) for log in training] == ["1", "2"]
    for row, log in zip(table, training, strict=True):
        assert row["Reward"] == readable(log["objective/scores"])
        assert row["KL (nats)"] == readable(log["objective/kl"])
        assert row["Length (tokens)"] == readable(log["completions/mean_length"])
        assert "Loss" not in row
    (evaluation,) = [log for log in log_of(executed, "ppo_with_a_function") if "eval_runtime" in log]
    assert table[1]["Eval reward"] == readable(evaluation["eval_objective/scores"]) and table[0]["Eval reward"] == ""


def test_a_reward_model_shows_its_accuracy_with_an_interval(executed):
    table = table_of_training(executed, "reward_model")
    (evaluation,) = [log for log in log_of(executed, "reward_model") if "eval_runtime" in log]
    low, high = (readable(evaluation[f"eval_accuracy_{side}"]) for side in ("low", "high"))
    assert table[1]["Eval accuracy"] == f"{readable(evaluation['eval_accuracy'])} ({low} to {high})"
    assert {"Step", "Loss", "Accuracy"} <= set(table[0])


def test_after_an_interruption_an_evaluation_has_a_table_of_its_own(executed):
    (interrupted,) = tables(executed["interrupted"]) or ([],)
    assert "interrupted" in text_of(executed["interrupted"])
    assert all(row.get("Eval reward", "") == "" for row in interrupted)
    (evaluated,) = tables(executed["evaluated"])
    assert len(evaluated) == 1 and set(evaluated[0]) >= {"Step", "Eval reward", "Eval KL (nats)"}
    assert "eval_runtime" in text_of(executed["runtime"])  # Transformers' table would remove it from the result


def test_a_resumed_run_shows_its_earlier_rows(executed):
    (table,) = tables(executed["resumed"])
    assert [row["Step"] for row in table][:2] == ["1", "2"]
    assert table[0]["Reward"] == table_of_training(executed, "ppo_with_a_function")[0]["Reward"]


def test_the_pipeline_ends_with_a_report(executed):
    outputs = [output for key, cell in executed.items() if key.startswith("pipeline-") for output in cell]
    reports = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert len(reports) == 1 and "reward" in reports[0].lower()


def test_no_cell_warns_of_missing_widgets(executed):
    for outputs in executed.values():
        assert "IProgress" not in text_of(outputs, "stderr")
