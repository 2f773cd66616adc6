"""The leak scanner: finds every kind of leak in a folder that looks like a run, and has no false alarms."""

import gzip
import json
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.privacy import hub_owners, strip_local_paths
from hf_rlhf_ext.hub.scan import Finding, refuse_findings, scan, scan_folder

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
    ("token", "c.txt", "eyJ" + DIGITS + ".eyJ" + DIGITS + "." + DIGITS),
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
    ("email", "samples.jsonl", json.dumps({"completion": "write to\njane.doe@corp.com today"})),
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


def test_vocabularies_may_spell_anything_but_tokens():
    assert scan({"tokenizer.json": b'{"/usr/bin": 1, "a@b.com": 2, "/home/": 3}'}) == []


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
        UserError, match=r"path:a.txt:1 \(/mnt/x\); .*; and 2 more. Remove it.*--allow path:a.txt:1 "
    ) as e:
        refuse_findings(findings)
    assert "\n" not in str(e.value)


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
    rows = "\n".join(["one\u2028two\x85three", "bob@corp.com"])
    assert [f.line for f in scan({"a.jsonl": rows.encode()})] == [2]


def test_a_large_file_is_read_to_its_end(tmp_path):
    (tmp_path / "large").write_bytes((b"a word " * 150_000 + b"\n") * 33 + b"hf_" + DIGITS.encode())  # 33 MiB
    assert [f.line for f in scan({"tokenizer.json": tmp_path / "large"})] == [34]


def test_long_lines_are_no_trouble():
    start = time.monotonic()
    scan(
        {"a.jsonl": (b"a word / and more words, " * 80_000), "b.txt": b"/" * 200_000 + b"a." * 200_000 + b"@" * 50_000}
    )
    assert time.monotonic() - start < 10
