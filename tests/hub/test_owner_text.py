"""Text that the owner of a model wrote into its card stays, in the folder and on the Hub."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file

from hf_rlhf_ext.hub.card import render_card
from hf_rlhf_ext.hub.cards.owner_text import CardMerge, OwnedCard, digest, marked, merged, save_card
from hf_rlhf_ext.hub.push import push_files, push_run

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTACT = "## Contact\n\nAsk in the community tab.\n"


def card(accuracy=0.75, **options):
    """A generated card, between its marks."""
    report = {"reward_model": {"accuracy": accuracy, "heldout_pairs": 8}}
    return marked(render_card("reward_model", report, base_model=BASE, **options))


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def edited(text, **changes):
    """The card with other values in its header; None removes a key."""
    parts = text.split("---\n", 2)
    values = {key: value for key, value in (yaml.safe_load(parts[1]) | changes).items() if value is not None}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n{parts[2]}"


def merge(new, old, **options):
    return merged(new, old, where="alice/x", **options)


def values(text):
    """The accuracies in the model index."""
    results = [result for model in header(text)["model-index"] for result in model["results"]]
    return [found["value"] for result in results for found in result["metrics"] if "ccuracy" in found["name"]]


def test_a_card_in_parts_is_the_card_again():
    text = card().replace("\n<!--", "\n# Mine\n\n<!--", 1) + "\n" + CONTACT
    parsed = OwnedCard.parse(text)
    assert parsed.before == "# Mine" and parsed.after == CONTACT.strip() and not parsed.is_edited
    assert OwnedCard.parse(parsed.to_text()) == parsed and marked(text) == text
    assert OwnedCard.parse(text.replace("\n", "\r\n")) == parsed


@pytest.mark.parametrize("old", [None, "", card(), card(0.5)])
def test_a_card_that_nobody_edited_is_the_new_one(old):
    assert merge(card(), old) == (card(), [])


def test_text_around_the_generated_part_stays_and_the_part_is_new():
    old = card(0.5).replace("\n<!--", "\nA note of mine.\n\n<!--", 1) + "\n" + CONTACT
    text, said = merge(card(), old)
    assert text.index("A note of mine.") < text.index("# ") and text.endswith(CONTACT) and said == []
    assert OwnedCard.parse(text).part == OwnedCard.parse(card()).part
    assert merge(card(), text) == merge(text, text) == merge(text, old) == (text, [])


def test_keys_of_the_header_that_the_owner_added_changed_or_removed_stay():
    old = edited(card(0.5), license="mit", inference=False, pipeline_tag=None)
    found = header(merge(card(), old)[0])
    expected = header(card()) | {"license": "mit", "inference": False}
    del expected["pipeline_tag"]
    assert found == expected
    assert header(merge(card(), old, asked={"license"})[0])["license"] == "apache-2.0"


def test_tags_are_merged_one_by_one():
    ours = header(card())["tags"]
    old = edited(card(tags=["earlier"]), tags=["poetry", *ours[1:], "earlier"])
    assert header(merge(card(tags=["new"]), old)[0])["tags"] == [*ours[1:], "new", "poetry"]


def test_numbers_of_other_weights_leave_the_model_index_and_the_owner_s_stay():
    old = header(card(0.5))["model-index"]
    mine = {"task": {"type": "text-generation"}, "dataset": {"type": "x", "name": "x"}}
    mine["metrics"] = [{"type": "accuracy", "name": "My accuracy", "value": 0.9}]
    old[0]["results"].append(mine)
    text = merge(card(), edited(card(0.5), **{"model-index": old}))[0]
    assert values(card()) == [0.75] and values(text) == [0.75, 0.9]
    assert merge(card(), text)[0] == text


def test_an_edited_part_stays_with_a_line_and_a_cleared_one_is_replaced():
    part = OwnedCard.parse(card(0.5)).part
    old = card(0.5).replace(part, "# My words\n\nOnly mine.")
    text, (line,) = merge(card(), old)
    assert "Only mine." in text and "## " not in text and "delete the text between the two marks" in line
    assert merge(card(), text)[0] == text and len(merge(card(), text)[1]) == 1  # still edited
    assert merge(card(), card(0.5).replace(part, "")) == (card(), [])


def test_a_card_of_somebody_else_stays_whole_above_the_generated_part():
    old = "---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nIt writes poems.\n"
    text, (line,) = merge(card(), old)
    assert text.index("It writes poems.") < text.index("rlhf_ext: the generated part begins") and "stays" in line
    assert header(text)["license"] == "mit" and {"mine", "reward-model"} <= set(header(text)["tags"])
    assert merge(card(0.5), text)[1] == [] and "It writes poems." in merge(card(0.5), text)[0]


PEFT_FORM = ModelCard.from_template(ModelCardData()).text
TRAINER_CARD = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access"
)
TRL_CARD = (
    "# Model Card for x\n\nThis model is a fine-tuned version of [None](https://huggingface.co/None).\n"
    "It has been trained using [TRL](https://github.com/huggingface/trl).\n\n## Quick start\n\n```python\n# a\n```\n\n"
    "## Training procedure\n\n### Framework versions\n\n- TRL: 1.16.0\n\n## Citations\n"
)


@pytest.mark.parametrize(
    "form",
    [
        PEFT_FORM,
        f"{PEFT_FORM}\n### Framework versions\n\n- PEFT 0.21.0",
        f"{TRAINER_CARD} access to. -->\n# x",
        TRL_CARD,
    ],
)
def test_a_card_that_another_library_generated_is_replaced(form):
    assert merge(card(), f"---\nbase_model: /home/jane/base\n---\n{form}") == (card(), [])
    filled = form.replace("[More Information Needed]", "Jane", 1) + "\n## Contact\n\nJane\n"
    if TRAINER_CARD not in form:  # whose comment asks its owner to remove it
        assert "Jane" in merge(card(), filled)[0]


@pytest.mark.parametrize("end", ["", "\n### Framework versions\n\n- PEFT 0.21.0\n"])
def test_of_peft_s_form_only_what_its_owner_added_stays(end):
    form = "---\nbase_model: /home/jane/base\nlicense: mit\ntags: [lora, poems]\nlibrary_name: peft\n---\n"
    form += PEFT_FORM + end + "\nAsk me.\n\n```\n# Uses\n```\n"
    old = form.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** Jane", 1)
    heading, _, rest = old.partition("### Direct Use")
    old = heading + "### Direct Use" + rest.replace("[More Information Needed]", "To write poems.", 1)
    text, said = merge(card(base_dtype="float32"), old)
    parsed = OwnedCard.parse(text)
    owned = "### Model Description\n\n- **Developed by:** Jane\n\n### Direct Use\n\nTo write poems.\n\nAsk me."
    assert parsed.owner_text == f"{owned}\n\n```\n# Uses\n```" and said == []
    assert parsed.part == OwnedCard.parse(card(base_dtype="float32")).part and not parsed.is_edited
    made = header(card(base_dtype="float32"))
    assert header(text) == made | {"license": "mit", "tags": [*made["tags"], "poems"]}
    assert merge(card(base_dtype="float32"), text) == (text, [])


def test_a_card_from_before_the_marks_is_replaced_but_for_sections_of_the_owner():
    plain = OwnedCard.parse(card(0.5))
    unmarked = f"---\n{plain.header_text}\nlicense_note: mine\n---\n\n{plain.part}\n\n"
    assert "counts as" not in merge(card(), unmarked)[1][0] and unmarked.count("## Usage") == 1  # whose marks are gone
    unmarked = unmarked.replace("## Usage", "## How to load it")  # as it was called then
    text, (line,) = merge(card(), unmarked + CONTACT)
    assert "earlier version" in line and text.endswith(CONTACT) and text.count("## Results") == 1
    assert values(text) == [0.75] and header(text)["license_note"] == "mine"


def test_weights_without_a_card_take_the_numbers_away_and_leave_the_owner_s_text():
    assert merge(None, card()) == (None, [])
    text, _ = merge(None, edited(card(), license="mit") + "\n" + CONTACT)
    assert header(text) == {"license": "mit"} and CONTACT in text and "ccuracy" not in text
    again, said = merge(card(), text)
    assert OwnedCard.parse(again).part == OwnedCard.parse(card()).part and CONTACT in again and said == []
    assert header(again) == header(card()) | {"license": "mit"}
    assert merge(None, "# A page of mine\n") == ("# A page of mine\n", [])


def test_edits_in_the_folder_and_on_the_hub():
    local, there = card() + "\nIn the folder.\n", card() + "\nOn the Hub.\n"
    text, (line,) = merge(local, there)
    assert "In the folder." in text and "On the Hub." in text and "both texts are kept" in line
    pushed = [digest("On the Hub.")]  # at the last push, the folder had that text, so the folder's text is newer
    text, said = merge(local, there, pushed=pushed)
    assert "In the folder." in text and "On the Hub." not in text and said == []
    assert merge(card(), there, pushed=pushed)[0] == there  # the folder has no text now
    mixed, pushed = card() + "\nFrom both.\n\nAdded there.\n", [digest("From both."), digest("Removed there.")]
    text, said = merge(card() + "\nFrom both.\n\nRemoved there.\n\nAdded here.\n", mixed, pushed=pushed)
    assert OwnedCard.parse(text).after == "From both.\n\nAdded there.\n\nAdded here." and len(said) == 1


MARKS = [line for line in card(0.5).splitlines() if line.startswith("<!-- hf_rlhf_ext")]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\ufeff" + text,
        lambda text: "\n" + text,  # above the header
        lambda text: text.replace(MARKS[0], ""),
        lambda text: text.replace(MARKS[0], MARKS[0].replace("stays", "> remains")),
        lambda text: text.replace(CONTACT, "") + text.split("---\n", 2)[2],  # pasted twice
    ],
    ids=["windows", "old mac", "byte order mark", "blank line", "first mark gone", "mark edited", "twice"],
)
def test_a_card_that_an_editor_changed_in_its_form_is_read(change):
    old = change(card(0.5) + "\n" + CONTACT)
    assert merge(card(), old) == (card() + "\n" + CONTACT, [])


def test_a_mark_in_a_code_block_is_text():
    shown = f"```html\n{MARKS[0]}\nx\n{MARKS[1]}\n```"
    foreign = f"# Mine\n\n{shown}\n"
    text = merge(card(), foreign)[0]
    assert OwnedCard.parse(text).before == foreign.strip() and merge(card(), text) == (text, [])
    old = card(0.5).replace(MARKS[0], f"{shown}\n\n{MARKS[0]}") + f"\n{shown}\n"
    text, said = merge(card(), old)
    assert values(text) == [0.75] and OwnedCard.parse(text).before == OwnedCard.parse(text).after == shown and not said


def test_without_the_second_mark_all_is_text_of_the_owner_and_the_index_has_the_new_number():
    text, (line,) = merge(card(), card(0.5).replace(MARKS[1], "") + "\n" + CONTACT)
    assert "only one of the two marks" in line and text.count("rlhf_ext: the generated part begins") == 1
    assert OwnedCard.parse(text).before.endswith(CONTACT.strip()) and values(text) == [0.75]
    assert merge(card(), text) == (text, [])


@pytest.mark.parametrize("change", [("---\n", ""), ("\n---\n", "\n"), ("license:", "license: [a\nx")])
def test_a_header_that_cannot_be_read_is_written_anew(change):
    text, (line,) = merge(card(), card(0.5).replace(*change, 1) + "\n" + CONTACT)
    assert header(text) == header(card()) and text.endswith(CONTACT) and "no header" in line


@pytest.mark.parametrize("index", ["foo", ["foo"], [{"results": ["x"]}], [{"results": [{"metrics": None}]}], [], {}])
def test_a_model_index_that_is_none_gives_way(index):
    text = merge(card(), f"---\n{yaml.safe_dump({'model-index': index})}---\n# Mine\n")[0]
    assert values(text) == [0.75]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_card_in_another_encoding_keeps_its_characters(tmp_path, encoding):
    (tmp_path / "README.md").write_bytes("# Café\n".encode(encoding))
    save_card(tmp_path / "README.md", card())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert OwnedCard.parse(text).before == "# Café"
    stored = CardMerge()(card().encode(), "# Café\n".encode(encoding))[0].decode()
    assert OwnedCard.parse(stored).before == "# Café"


def test_code_blocks_of_the_owner_are_not_taken_apart():
    code = "```python\ndef f():\n\n    return 1\n```"
    local = card() + f"\nSee:\n\n{code}\n"
    there = card() + "\nAlso:\n\n" + code.replace("f()", "g()") + "\n"
    text, said = merge(local, there)
    assert code in text and code.replace("f()", "g()") in text and len(said) == 1


def test_a_card_that_is_written_again_keeps_the_text_in_the_folder(tmp_path, capsys):
    path = tmp_path / "README.md"
    save_card(path, card(0.5))
    path.write_text(path.read_text() + "\n" + CONTACT)
    save_card(path, card())
    assert path.read_text() == card() + "\n" + CONTACT and capsys.readouterr().err == ""


# Pushes


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run with a card."""
    folder = tmp_path / "polite"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": BASE}))
    save_file({"lora": torch.ones(8)}, folder / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    write_report(folder, 0.75)
    return folder


def write_report(folder, accuracy):
    report = {"reward_model": {"accuracy": accuracy, "heldout_pairs": 8}, "versions": {}, "command": "python x.py"}
    (folder / "report.json").write_text(json.dumps(report | {"card": {"kind": "reward_model", "base_model": BASE}}))


def page(hub, **options):
    return hub.files("alice/polite", **options)["README.md"].decode()


def edit(hub, text, repo="alice/polite"):
    HfApi().upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="README.md")


def test_edits_on_the_hub_stay_at_the_next_push(hub, run_folder):
    push_run(run_folder, "alice/polite")
    edit(hub, edited(page(hub), license="mit", inference=False) + "\n" + CONTACT)
    write_report(run_folder, 0.5)
    push_run(run_folder, "alice/polite")
    assert page(hub).endswith(CONTACT) and values(page(hub)) == [0.5]
    assert header(page(hub))["license"] == "mit" and header(page(hub))["inference"] is False
    commits = len(hub.repo("alice/polite").history())
    push_run(run_folder, "alice/polite")
    assert len(hub.repo("alice/polite").history()) == commits  # nothing changed
    push_run(run_folder, "alice/polite", license="cc-by-4.0")  # given now
    assert header(page(hub))["license"] == "cc-by-4.0" and page(hub).endswith(CONTACT)


def test_edits_in_the_folder_are_pushed_and_may_change_again(hub, run_folder, capsys):
    push_run(run_folder, "alice/polite")
    for text in ("First words.", "Other words."):
        (run_folder / "README.md").write_text(card() + f"\n{text}\n")
        push_run(run_folder, "alice/polite")
        assert page(hub).endswith(f"\n\n{text}\n") and values(page(hub)) == [0.75]
    assert "First" not in page(hub) and "both texts" not in capsys.readouterr().err


def test_text_of_the_hub_stays_if_the_folder_gets_text_later(hub, run_folder):
    push_run(run_folder, "alice/polite")
    edit(hub, page(hub) + "\n" + CONTACT)
    push_run(run_folder, "alice/polite")
    (run_folder / "README.md").write_text(card() + "\nIn the folder.\n")
    push_run(run_folder, "alice/polite")
    assert CONTACT.strip() in page(hub) and "In the folder." in page(hub)
    (run_folder / "README.md").write_text(card() + "\nIn other words.\n")
    push_run(run_folder, "alice/polite")
    assert page(hub).endswith(CONTACT + "\nIn other words.\n") and "In the folder." not in page(hub)


def test_concurrent_pushes_both_arrive(hub, run_folder, naps):
    push_run(run_folder, "alice/polite")
    edit(hub, page(hub) + "\n" + CONTACT)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: push_run(run_folder, "alice/polite", tags=["again"]), range(3)))
    assert page(hub).endswith(CONTACT) and page(hub).count("generated part begins") == 1


def test_an_edit_that_comes_between_two_attempts_stays(hub, run_folder, naps, monkeypatch):
    push_run(run_folder, "alice/polite")
    write_report(run_folder, 0.5)
    commit, first = HfApi.create_commit, [True]

    def overtaken(self, *args, **options):
        if first and first.pop():
            edit(hub, page(hub) + "\n" + CONTACT)
        return commit(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    push_run(run_folder, "alice/polite")
    assert page(hub).endswith(CONTACT) and values(page(hub)) == [0.5]


def test_a_branch_has_a_card_of_its_own(hub, run_folder):
    push_run(run_folder, "alice/polite")
    edit(hub, page(hub) + "\n" + CONTACT)
    push_run(run_folder, "alice/polite", revision="from-main")
    assert page(hub, revision="from-main").endswith(CONTACT)


def test_a_readme_of_the_owner_s_alone_is_pushed_as_it_is(hub, run_folder, capsys):
    (run_folder / "report.json").unlink()
    (run_folder / "README.md").write_text("---\nlicense: mit\n---\n# All mine\n")
    push_run(run_folder, "alice/polite", tags=["poetry"])
    assert page(hub) == "---\nlicense: mit\n---\n# All mine\n"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "tags: not used" in line and "write it there" in line


def test_the_object_that_merges_knows_what_was_pushed(hub):
    merging = CardMerge()
    push_files({"README.md": (card() + "\n" + CONTACT).encode()}, "alice/polite", merge_card=merging)
    assert set(merging.paragraphs) == {digest("## Contact"), digest("Ask in the community tab.")}
