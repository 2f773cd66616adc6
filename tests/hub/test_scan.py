"""The leak scanner: finds every kind of leak in a folder that looks like a run, and has no false alarms."""

import gzip
import io
import json
import pickle
import struct
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.base_files import texts_of_base
from hf_rlhf_ext.hub.privacy import hub_owners, strip_local_paths
from hf_rlhf_ext.hub.scan import Finding, refuse_findings, scan, scan_folder, scan_text
from hf_rlhf_ext.hub.scanning.findings import REMEDIES
from tests.hub import leaks

ROOT = Path(__file__).parents[2]
DIGITS = "aB3dE6gH9j" * 4
FAKE = "-".join(["sk", "proj", DIGITS])  # joined here, so that scanners of this repository do not report it


@pytest.fixture
def machine(tmp_path, monkeypatch):
    home = tmp_path / "homes" / "zelda77"
    home.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "LOGNAME": "zelda77",
        "USER": "zelda77",
        "MY_API_KEY": "v3ry-odd-value",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "gpubox9.lab.local")
    return home


TEXT_LEAKS = [  # kind of finding, file, the line it is in
    ("token", "README.md", "hf_" + DIGITS),
    ("token", "train.yaml", f"key: {FAKE}"),
    ("token", "report.json", json.dumps({"a": "ghp_" + DIGITS})),
    ("token", "notes.txt", "github_pat_" + DIGITS),
    ("token", "log.txt", "AKIA" + "ABCDEFGH12345678"),
    ("token", "samples.md", "glpat-" + DIGITS),
    ("token", "a.txt", "xoxb-" + DIGITS),
    ("token", "b.txt", "AIza" + DIGITS),
    ("token", "c.txt", leaks.jwt()),
    ("token", "d.txt", "its value is v3ry-odd-value"),  # the value of an environment variable
    ("token", "tokenizer.json", json.dumps({"model": "hf_" + DIGITS})),
    ("private-key", "id.txt", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
    ("credential", "e.txt", "Authorization: Bearer abcdefghijklmnop"),
    ("credential", "f.yaml", "hub_token: abcdefgh1234"),
    ("credential", "g.txt", "aws_secret_access_key = abcdefgh1234+/="),
    ("credential", "h.txt", "git clone https://bob:hunter22@git.example.com/x"),
    ("credential", "args.json", json.dumps({"wandb_api_key": "0123456789abcdef"})),
    ("home", "i.txt", "python /home/bob/train.py"),
    ("home", "j.txt", "/Users/bob/models"),
    ("home", "adapter_config.json", json.dumps({"base_model_name_or_path": r"C:\Users\bob\model"})),
    ("user", "k.txt", "by zelda77."),
    ("host", "l.txt", "ran on gpubox9"),
    ("email", "samples.json", json.dumps({"completion": "write to\njane.doe@corp.com today"})),
    ("email", "votes.jsonl", json.dumps({"annotator": "jane.doe@corp.com"})),  # a whole value, not part of a text
    ("address", "m.txt", "vllm at http://192.168.1.20:8000"),
    ("path", "n.yaml", "dataset_name: /mnt/disk/pairs.jsonl"),
    ("path", "o.txt", r"\\server\share\x"),
    ("path", "p.txt", "file:///srv/x"),
    ("path", "q.txt", "see ~/runs/a"),
    ("remote-code", "config.json", json.dumps({"trust_remote_code": True})),
    ("remote-code", "r.yaml", "trust_remote_code: yes"),
    ("remote-code", "s.md", "python recipes/sft.py --trust_remote_code true --seed 1"),
    ("remote-code", "t.md", "python recipes/sft.py --seed 1 --trust_remote_code"),
    ("remote-code", "value/config.json", json.dumps({"auto_map": {"AutoModel": "modeling.X"}})),
]


@pytest.mark.parametrize("kind, name, leak", TEXT_LEAKS, ids=lambda value: str(value)[:24])
def test_a_leak_in_text_is_found_with_its_line(machine, kind, name, leak):
    found = scan({name: f"first line\n\n{leak}\nlast line\n".encode()})
    assert [(f.kind, f.file, f.line) for f in found] == [(kind, name, 3)]
    if kind in ("token", "private-key", "credential"):
        assert len(found[0].text) <= 7  # not the whole secret


def test_leaks_that_are_files(machine, tmp_path):
    folder = tmp_path / "run"
    (folder / "runs").mkdir(parents=True)
    torch.save({"a": torch.zeros(2)}, folder / "optimizer.pt")
    torch.save([1], folder / "training_args.bin")
    (folder / "renamed.dat").write_bytes(pickle.dumps({"a": 1}))
    torch.save([1], folder / "weights")
    (folder / "ascii.txt").write_bytes(pickle.dumps(Path("x"), protocol=0))
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("a" * 100 + ".txt", "x")
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("a" * 100 + "/data.pkl", "x")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"/mnt/disk/x"))
    (folder / "wide.txt").write_text("/mnt/disk/x", encoding="utf-16")
    (folder / "rows.db").write_bytes(b"SQLite format 3\0")
    (folder / "short.safetensors").write_bytes(b"\x08")
    (folder / "modeling_x.py").write_text("print()")
    (folder / "runs" / "events.out.tfevents.1.gpubox9").write_bytes(b"\0")
    (folder / "secret.txt").symlink_to("/etc/hostname")
    (folder / "plot.png").write_bytes(b"\x89PNG\0\0" + str(machine).encode())
    save_file({"w": torch.zeros(2)}, folder / "w.safetensors", metadata={"a": "{}", "from": "/mnt/disk/run"})
    found = {(f.file, f.kind) for f in scan_folder(folder)}
    assert found == {
        ("optimizer.pt", "pickle"),
        ("training_args.bin", "pickle"),
        ("renamed.dat", "pickle"),
        ("weights", "pickle"),
        ("ascii.txt", "pickle"),
        ("data.zip", "binary"),
        ("model.zip", "pickle"),
        ("rows.jsonl.gz", "binary"),
        ("wide.txt", "binary"),
        ("rows.db", "binary"),
        ("short.safetensors", "binary"),
        ("modeling_x.py", "code"),
        ("runs/events.out.tfevents.1.gpubox9", "host"),
        ("runs/events.out.tfevents.1.gpubox9", "event-file"),
        ("secret.txt", "link"),
        ("plot.png", "home"),
        ("w.safetensors", "path"),
    }


@pytest.mark.parametrize(
    "line",
    [
        "reward/nat, 1/2, and/or, TCP/IP, 24/7 and </s> or <br/>",
        "https://huggingface.co/a/b, hf://x/y and arXiv:2203.02155",
        "python recipes/ppo.py --output_dir runs/ppo --dataset_name <path>/pairs.jsonl",
        '{"pad_token": "<|pad|>", "eos_token": "</s>", "trust_remote_code": false, "hub_token": null}',
        "hub_token: <HUB_TOKEN>",
        "python x.py --trust_remote_code false --push_to_hub true; --trust_remote_code=no",
        '{"chat_template": "{{ \'A:\\\\n\\\\n\' + m }}\\nQ:\\nuser: what"}',
        "posted in /r/AskReddit by /u/someone; SUBREDDIT: r/relationships",
        "@article{ouyang2022training, journal={arXiv}} git@github.com:a/b you@example.com",
        "torch 2.13.0+cpu, cuda 12.10.1.2, 10 of 20",
        "root of the tree, the user said, a local host",
    ],
)
def test_what_is_no_leak(machine, line):
    assert scan({"README.md": line.encode(), "x.json": line.encode()}) == []


def test_entries_of_a_vocabulary_may_spell_anything_but_tokens_and_what_is_no_entry_is_text(machine):
    entries = ("/usr/share/x", "a@b.com", "/home/", "/mnt/x/y")
    assert scan({"tokenizer.json": leaks.tokenizer_json(vocabulary=entries)}) == []
    found = scan({"tokenizer.json": leaks.tokenizer_json("/mnt/x/z", vocabulary=entries)})
    assert [(f.kind, f.line, f.text) for f in found] == [("path", 5, "/mnt/x/z")]
    for entry, kind in ((FAKE, "token"), (str(machine), "home")):
        assert [f.kind for f in scan({"tokenizer.json": leaks.tokenizer_json(vocabulary=(entry,))})] == [kind]
        assert [f.kind for f in scan({"spiece.model": leaks.sentencepiece("x", (entry,))})] == [kind]
    unigram = {"model": {"type": "Unigram", "vocab": [["/mnt/x/y", -1.5]]}, "truncation": {"from": "/mnt/x/z"}}
    assert [f.text for f in scan({"tokenizer.json": json.dumps(unigram).encode()})] == ["/mnt/x/z"]
    assert [f.kind for f in scan({"a.model": b"\xff\xfe\x00 no model"})] == ["binary"]


def test_findings_are_let_pass_one_by_one(machine):
    files = {"a.txt": b"/mnt/x/y\nbob@corp.com\nann@corp.com\n"}
    assert len(scan(files)) == 3
    assert [f.line for f in scan(files, allow=["email:a.txt:3"])] == [1, 2]
    assert [f.kind for f in scan(files, allow=["email:a.txt"])] == ["path"]
    assert scan(files, allow=["email:a.txt", "path:a.txt:1"]) == []
    assert len(scan(files, allow=["a.txt", "email", "path:b.txt:1"])) == 3


def test_a_refusal_is_one_line_with_file_and_line():
    refuse_findings([])
    findings = [Finding("path", "a.txt", k, "/mnt/x") for k in range(1, 8)]
    with pytest.raises(
        UserError, match=r"path:a.txt:1 \(/mnt/x\); .*; and 2 more.*relative one.*--allow path:a.txt "
    ) as e:
        refuse_findings(findings)
    assert "\n" not in str(e.value)
    few = [*findings[:2], Finding("email", "my notes.txt", 3, "a@b.de")]
    with pytest.raises(UserError, match="--allow path:a.txt:1 path:a.txt:2 'email:my notes.txt:3' "):
        refuse_findings(few)


def test_none_on_the_shipped_cards_and_reports():
    for folder in (ROOT / "model_cards", ROOT / "docs" / "quickstart"):
        assert any(folder.rglob("*.md")) and scan_folder(folder) == []


def test_a_name_on_the_hub_is_public_and_a_name_that_ordinary_text_holds_is_none(machine, monkeypatch):
    card = {"README.md": b'load_policy("zelda77/polite")\nby zelda77'}
    assert [f.line for f in scan(card)] == [1, 2]
    assert scan(card, public={"zelda77"}) == []
    ids = "SFT: zelda77/sft@ab12, --dataset_name datasets/zelda77/pairs"
    assert strip_local_paths(f"{ids}, made by zelda77") == f"{ids}, made by <user>"
    assert strip_local_paths("--output_dir zelda77/runs/a") == "--output_dir <user>/runs/a"
    (machine / "zelda77").mkdir()
    (machine / "zelda77" / "rows.jsonl").touch()
    monkeypatch.chdir(machine)
    assert strip_local_paths("zelda77/rows.jsonl") == "<user>/rows.jsonl"  # a local file, so not an id on the Hub
    assert hub_owners("Zelda77/sft@ab12", "datasets/bob/x", "local sft (sha256 1)", "a/b/c", None) == {"zelda77", "bob"}
    monkeypatch.setenv("LOGNAME", "test")
    assert strip_local_paths("--dataset_test_split test") == "--dataset_test_split test"
    assert scan({"a.txt": b"test"}) == []


def test_a_line_is_what_ends_with_a_newline(machine):
    rows = "\n".join(["one\u2028two\x85three", "hf_" + DIGITS])
    assert [f.line for f in scan({"a.jsonl": rows.encode()})] == [2]


def test_a_large_file_is_read_to_its_end(tmp_path):
    (tmp_path / "large").write_bytes((b"a word " * 150_000 + b"\n") * 17 + b"hf_" + DIGITS.encode())  # 17 MiB
    assert [f.line for f in scan({"rows.jsonl": tmp_path / "large"})] == [18]


def test_long_lines_and_large_vocabularies_are_no_trouble():
    vocabulary = tuple(f"▁piece{k}" for k in range(30_000))
    start = time.process_time()
    lines = {
        "a.jsonl": (b"a word / and more words, " * 80_000),
        "b.txt": b"/" * 100_000 + b"a." * 100_000 + b"@" * 50_000,
        "c.txt": b"key" * 20_000 + b"secret_" * 20_000 + b"://" * 20_000 + b"sk-" * 10_000,
        "tokenizer.json": leaks.tokenizer_json(vocabulary=vocabulary),
    }
    assert [f.file for f in scan(lines)] in ([], ["b.txt"])
    assert time.process_time() - start < 10


# The seeded lists


def seeded(seed: leaks.Seed) -> list[Finding]:
    if seed.file == leaks.ROWS:
        return list(scan_text(seed.content.decode(), "train.jsonl", written_by_people=True))
    return scan({seed.file: seed.content})


def test_all_of_the_seeded_leaks_are_found(machine):
    seeds = leaks.leaks()
    assert len(seeds) >= 60
    missed = [seed[:3] for seed in seeds if seed.kind not in {finding.kind for finding in seeded(seed)}]
    assert missed == []


def test_the_seeded_harmless_files_are_let_pass(machine):
    seeds = leaks.harmless()
    assert len(seeds) >= 60
    alarms = [(seed.file, finding) for seed in seeds for finding in seeded(seed)]
    assert alarms == []


def test_a_secret_is_never_sent_to_its_provider(monkeypatch):
    from detect_secrets.settings import transient_settings

    def request(*args, **kwargs):
        raise AssertionError("asked the provider")

    monkeypatch.setattr("requests.sessions.Session.request", request)
    verify = "detect_secrets.filters.common.is_ignored_due_to_verification_policies"
    with transient_settings({"filters_used": [{"path": verify, "min_level": 2}]}):  # its own default
        for what in ("Slack webhook", "Stripe", "Mailchimp"):
            text = leaks.SECRETS[what]
            assert [f.kind for f in scan({"a.txt": text.encode()})] == ["token"]


# Text that people or models wrote


def test_rows_and_samples_are_text_except_for_tokens_and_this_machine(machine):
    text = "see /mnt/disk/x at 192.168.1.20, password: hunter22x, mail jane@corp.com, by {}"
    for name, content in {
        "rows.jsonl": json.dumps({"completion": text}),
        "samples.md": text,
        "report.json": json.dumps({"card": {"samples": [{"prompt": "a", "before": text, "after": "b"}]}}),
    }.items():
        for trace, kind in (
            ("me", ""),
            ("zelda77", "user"),
            ("gpubox9", "host"),
            (str(machine), "home"),
            (FAKE, "token"),
        ):
            found = scan({name: content.replace("{}", trace).encode()})
            assert [f.kind for f in found] == ([kind] if kind else []), (name, trace)


def test_a_sample_is_text_where_the_card_shows_it_and_nothing_else_is(machine):
    sample = "cd /mnt/my_data && cat *.log\n[10.0.0.7] password: hunter22x"
    report = json.dumps({"samples": [{"prompt": "How?", "before": sample, "after": FAKE}]}).encode()
    shown = "- before: cd /mnt/my\\_data && cat \\*.log ⏎ \\[10.0.0.7\\] password: hunter22x"
    found = scan({"report.json": report, "README.md": f"{shown}\npassword: hunter23x\n/mnt/other".encode()})
    kinds = [(f.kind, f.file, f.line) for f in found]
    assert kinds == [("credential", "README.md", 2), ("path", "README.md", 3), ("token", "report.json", 1)]
    assert len(scan({"README.md": shown.encode()})) >= 3  # no report, no samples


def test_a_token_with_the_escapes_of_markdown_is_found():
    assert [f.kind for f in scan({"README.md": b"hf\\_" + DIGITS.encode()})] == ["token"]


def test_each_finding_says_how_to_go_on(machine):
    seeds = [*leaks.leaks(), leaks.Seed("pickle", "", "a.bin", b""), leaks.Seed("code", "", "a.py", b"")]
    for seed in seeds:
        for finding in seeded(seed):
            assert finding.remedy == REMEDIES[finding.kind]
    token, path = scan({"a.txt": leaks.SECRETS["Stripe"].encode()}), scan({"b.txt": b"/mnt/disk/x"})
    with pytest.raises(
        UserError,
        match=r"token:a.txt:1 \(Stripe Access Key: .*…\).*revoke.*relative.*--allow path:b.txt:1 token:a.txt:1 ",
    ):
        refuse_findings([*token, *path])


# What the base has published


TEMPLATE = "{# the tool keeps its files in '/mnt/data' #}\n{{ messages }}"


def base(name: str, folder: Path, private: bool = False, **files: str) -> str:
    """A base on the stand-in with these files, and its commit."""
    folder.mkdir(exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    HfApi().create_repo(name, private=private, exist_ok=True)
    return HfApi().upload_folder(repo_id=name, folder_path=folder).oid


def test_what_the_base_has_published_is_no_finding(hub, tmp_path):
    tokenizer = {"chat_template": TEMPLATE, "pad_token": "<pad>"}
    old = base("alice/base", tmp_path / "a", tokenizer_config__json=json.dumps(tokenizer))
    new = base("alice/base", tmp_path / "a", tokenizer_config__json=json.dumps({"chat_template": "{{ messages }}"}))
    run = {
        "chat_template.jinja": TEMPLATE.encode(),
        "member/tokenizer_config.json": json.dumps(tokenizer, indent=1).encode(),
        "README.md": f"The template:\n{TEMPLATE}\n".encode(),
    }
    assert len(scan(run)) == 3
    assert texts_of_base("alice/base", old) == {TEMPLATE}
    assert scan(run, known=lambda: texts_of_base("alice/base", old)) == []
    assert len(scan(run, known=lambda: texts_of_base("alice/base", new))) == 3
    changed = {"chat_template.jinja": f"{TEMPLATE}{{# /mnt/other #}}".encode()}
    assert [f.text for f in scan(changed, known=lambda: texts_of_base("alice/base", old))] == ["/mnt/other"]


def test_a_path_that_the_base_has_published_is_no_beginning_of_another_one():
    files = {"README.md": b"/mnt/base and /mnt/base/of/jane", "chat_template.jinja": b"x{{ '/mnt/base' }}"}
    found = scan(files, known=lambda: {"/mnt/base", "{{ '/mnt/base' }}"})
    assert [f.text for f in found] == ["/mnt/base/of/jane"]


def test_what_only_a_private_base_or_nobody_has_is_a_finding(hub, tmp_path, monkeypatch):
    base("alice/secret", tmp_path / "a", private=True, chat_template__jinja=TEMPLATE)
    base("alice/open", tmp_path / "b", chat_template__jinja=TEMPLATE)
    assert texts_of_base("alice/open") == {TEMPLATE}
    assert texts_of_base("alice/secret") == texts_of_base("alice/none") == texts_of_base(None) == frozenset()
    (tmp_path / "alice" / "open").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert texts_of_base("alice/open") == frozenset()  # a local folder with this name


def test_the_hub_is_asked_for_texts_of_the_base_only_where_something_was_found():
    asked = []
    assert scan({"a.txt": b"fine"}, known=lambda: asked.append(1) or ()) == [] and not asked
    assert len(scan({"a.txt": b"/mnt/x/y"}, known=lambda: asked.append(1) or ())) == 1 and asked


# Pictures


def test_a_text_behind_the_pixels_or_in_a_chunk_that_no_reader_knows_is_found(machine):
    picture = leaks.png("fine")
    end = picture.index(b"IEND") - 4
    for kind, content in ((b"tEXt", b"Comment\0" + FAKE.encode()), (b"zzZz", b"home: " + str(machine).encode())):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        assert len(scan({"a.png": picture[:end] + chunk + picture[end:]})) == 1
    assert [f.kind for f in scan({"a.png": leaks.png("x " * 50 + FAKE, zip=True)[:-14]})] == ["token"]  # cut off
    behind = io.BytesIO()
    with zipfile.ZipFile(behind, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", FAKE * 3)
    assert [f.kind for f in scan({"a.png": picture + behind.getvalue()})] == ["binary"]
