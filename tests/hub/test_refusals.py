"""What the Hub refuses is refused before training and before an upload, with its reason and a value that works."""

import random

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import BadRequestError
from huggingface_hub.utils import get_session, validate_repo_id

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub import licenses
from hf_rlhf_ext.hub.client import PushError, check_access, create_private_repo, push_files
from hf_rlhf_ext.hub.licenses import HUB_LICENSES, License, license_id, license_name, license_of_base, nearest_license
from hf_rlhf_ext.hub.refusals import (
    check_before_training,
    check_header,
    check_license,
    check_repo_name,
    possible_name,
    reason_of,
    reasons_of_hub,
    shortened,
)
from tests.hub import headers


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names


@pytest.mark.parametrize(
    "name, near",
    [
        ("My run (2)", "My-run-2"),
        ("a--b", "a-b"),
        ("x" * 100, "x" * 96),
        ("alice/my run", "alice/my-run"),
        ("runs/ppo/policy", "ppo/policy"),
        (".hidden", "hidden"),
        ("Äpfel.git", "Apfel"),
        ("文件夹", "my-model"),
        ("", "my-model"),
    ],
)
def test_a_name_that_no_repository_can_have_is_refused_without_asking_the_hub(hub, name, near):
    for call in (check_repo_name, check_access, create_private_repo, check_before_training):
        assert f"such as {near} (" in refusal(call, name)
    assert hub.requests == []


def test_every_proposed_name_is_possible():
    letters = random.Random(0)
    for _ in range(500):
        name = "".join(letters.choices("aZ9._-/ é文()", k=letters.randrange(120)))
        validate_repo_id(possible_name(name))
    assert possible_name("alice/my-model_1.0") == "alice/my-model_1.0"


# Licenses


@pytest.mark.parametrize(
    "text, id",
    [
        ("Apache 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("MIT License", "mit"),
        ("CC BY-SA 4.0", "cc-by-sa-4.0"),
        ("Creative Commons Attribution 4.0 International", "cc-by-4.0"),
        ("GPLv3", "gpl-3.0"),
        ("Llama 3.1", "llama3.1"),
        ("cc0", "cc0-1.0"),
        ("openrail++", "openrail++"),
        ("apache", None),
        ("GPL-3.0-or-later", None),
        ("our own terms", None),
        ("", None),
    ],
)
def test_a_spelling_that_is_certain_is_the_hub_s_license(text, id):
    assert license_id(text) == id


def test_no_two_licenses_have_the_same_spelling():
    spellings = {}
    for id, name in HUB_LICENSES.items():
        for text in {id, name}:
            assert spellings.setdefault(licenses._folded(text), id) == id
        assert license_id(id) == license_id(name) == id


def test_a_license_that_the_hub_does_not_know_is_refused_with_the_nearest(hub):
    assert "did you mean apache-2.0?" in refusal(check_license, "apache-2.o")
    message = refusal(check_before_training, "alice/a", license="Apache 2.0")
    assert '"license" must be one of [apache-2.0, mit, openrail, … 80 more]' in message  # the Hub's reason
    assert message.endswith("did you mean apache-2.0?")
    assert nearest_license("AGPL-3.0-or-later") == "agpl-3.0"
    assert refusal(check_license, "our terms").endswith("pass `other` with license_name and license_link.")
    assert "license_name" in refusal(check_license, "other")
    for license in HUB_LICENSES:
        check_license(license, name="a-1.0")


def test_a_license_that_only_the_hub_knows_is_accepted(hub, monkeypatch):
    monkeypatch.setattr(headers, "HUB_LICENSES", {"llama5": "Llama 5"})
    check_license("llama5")


def test_without_the_hub_the_list_of_licenses_decides(hub):
    hub.stop()
    check_before_training("alice/a", license="mit", header={"license": "mit"})
    assert "did you mean mit?" in refusal(check_license, "MITT")


def push_card(repo_id, **header):
    lines = "\n".join(f"{key}: {value}" for key, value in header.items())
    push_files({"README.md": f"---\n{lines}\n---\n# A\n".encode()}, repo_id, private=False)


def test_the_license_of_a_base_comes_with_its_name_and_its_link(hub):
    def of(name, **header):
        push_card(f"alice/{name}", **header)
        return license_of_base(f"alice/{name}")

    assert of("a", license="apache-2.0") == License("apache-2.0")
    named = License("other", "qwen-research", "https://huggingface.co/alice/b/blob/main/LICENSE")
    assert of("b", license="other", license_name="qwen-research", license_link="LICENSE") == named
    assert of("c", license="llama3.1", license_link="https://llama.example/terms").link == "https://llama.example/terms"
    assert of("d", license="[mit]") == License("mit")
    assert of("e", license="[mit, cc-by-4.0]") == License("other", "mit-cc-by-4.0", "https://huggingface.co/alice/e")
    assert of("f", tags="[a]") is None
    HfApi().create_branch("alice/b", branch="old")
    push_card("alice/b", license="mit")
    assert license_of_base("alice/b") == License("mit")
    old = "https://huggingface.co/alice/b/blob/old/LICENSE"
    assert license_of_base("alice/b", revision="old") == License("other", "qwen-research", old)
    assert license_of_base("alice/none") is license_of_base(None) is license_of_base("/runs/base") is None
    assert license_of_base("embedded:smollm2-135m-instruct") == License("apache-2.0")


def test_a_name_for_a_license_in_free_words():
    assert license_name("Our terms, see <b>page 2</b>!") == "our-terms-see-b-page-2-b"
    assert license_name("条款") == "custom" and len(license_name("x y " * 99)) <= 96


# Headers


@pytest.mark.parametrize(
    "header, reason",
    [
        (
            {"license": "Apache 2.0"},
            '"license" must be one of [apache-2.0, mit, openrail, … 80 more]. Did you mean apache-2.0?',
        ),
        ({"base_model": "/runs/base"}, '"base_model" with value "/runs/base" is not valid'),
        ({"datasets": ["a", "my rows"]}, '"datasets[1]" with value "my rows" is not valid'),
        ({"language": ["en", "English"]}, '"language[1]"'),
        ({"model-index": [{"name": "a"}]}, '"model-index[0].results" is required'),
        ({"tags": "a", "base_model": "b c"}, '"tags" must be an array'),
        ("---\na: [\n---\n# A", "README.md: the Hub refuses the header"),
    ],
)
def test_a_header_that_the_hub_refuses_is_refused_with_its_reason(hub, header, reason):
    assert reason in refusal(check_before_training, "alice/a", header=header)
    assert all(line == "POST /api/validate-yaml" for line in hub.requests)


def test_a_card_that_the_hub_refuses_stops_the_push_before_anything_is_created(hub, naps):
    weights = {
        "model.safetensors": (8).to_bytes(8, "little") + b"{}      ",
        "README.md": b"---\nbase_model: a b\n---\n",
    }
    message = refusal(push_files, weights, "alice/a")
    assert '"base_model" with value "a b" is not valid' in message
    assert hub.requests == ["POST /api/validate-yaml"] and hub.repos == {} and naps == []


def test_a_hub_that_cannot_be_asked_refuses_nothing(hub, monkeypatch):
    hub.fault(503, match="validate-yaml")
    assert reasons_of_hub({"license": "Apache 2.0"}) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_header({"license": "Apache 2.0"})


def test_the_hub_s_own_reason_is_in_the_message(hub, naps):
    hub.fault(403, match="repos/create")
    assert "fault on demand" in refusal(create_private_repo, "alice/a")
    hub.fault(400, match="preupload")
    with pytest.raises(PushError, match=r"^not pushed to alice/a: Bad request: fault on demand\.$"):
        push_files({"a.txt": b"a"}, "alice/a")
    assert naps == []  # the same request would be refused again
    error = ValueError('Invalid metadata in README.md.\n- "tags" must be an array\n- "a" is required')
    assert reason_of(error) == 'Invalid metadata in README.md: "tags" must be an array; "a" is required'
    message = ' (Request ID: Root=1-6; 3e)\n\nBad request:\n"tags" must be\nan array'
    error = BadRequestError(message, response=get_session().get(hub.url), server_message="no tags")
    assert reason_of(error) == "Bad request: no tags"
    assert reason_of(KeyError("a")) == "'a'" and shortened("a  [b, c]\nd") == "a [b, c] d"
