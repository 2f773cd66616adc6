"""A seeded list of leaks over kinds of files and providers, and a list of harmless texts, for the leak scanner.

Secrets are made at run time from parts, so that no other scanner alarms on this file. `ROWS` stands for the rows of a
data set, which people or models wrote.
"""

import base64
import io
import json
import random
import string
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save as save_safetensors

ROWS = "rows of a data set"
HEX = "0123456789abcdef"
ALNUM = string.ascii_letters + string.digits


class Seed(NamedTuple):
    """A file with a leak of this kind, or a harmless one (`kind` is empty)."""

    kind: str
    what: str
    file: str
    content: bytes


def letters(n: int, alphabet: str = ALNUM) -> str:
    """The same `n` random characters each time, with a digit among the first."""
    chosen = random.Random(f"{n}{alphabet}").choices(alphabet, k=n - 1)
    return "".join([chosen[0], "7", *chosen[1:]])


def encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def jwt() -> str:
    return ".".join([encoded({"alg": "HS256", "typ": "JWT"}), encoded({"sub": "1234567890"}), letters(43)])


SECRETS = {  # what a provider issues -> a secret in its format
    "Hugging Face": "hf_" + letters(34, string.ascii_letters + "7"),
    "OpenAI": "sk-" + "proj-" + letters(48),
    "Anthropic": "sk-" + "ant-api03-" + letters(80),
    "OpenRouter": "sk-" + "or-v1-" + letters(64, HEX),
    "Groq": "gs" + "k_" + letters(52),
    "Replicate": "r8" + "_" + letters(37),
    "xAI": "xai" + "-" + letters(80),
    "NVIDIA": "nv" + "api-" + letters(64),
    "Perplexity": "pp" + "lx-" + letters(48),
    "Pinecone": "pc" + "sk_" + letters(60),
    "LangSmith": "lsv2" + "_pt_" + letters(32, HEX) + "_" + letters(10, HEX),
    "GitHub": "gh" + "p_" + letters(36),
    "GitHub fine-grained": "github" + "_pat_" + letters(22) + "_" + letters(59),
    "GitLab": "gl" + "pat-" + letters(20),
    "AWS id": "AK" + "IA" + letters(16, string.ascii_uppercase + "234567"),
    "AWS secret": "aws_secret_access" + "_key = " + letters(40),
    "Google": "AI" + "za" + letters(35),
    "Google OAuth": "ya29" + "." + letters(60),
    "Google refresh": "1/" + "/0" + letters(60),
    "Google client": "GOC" + "SPX-" + letters(28),
    "Azure storage": "AccountName=toy;Account" + "Key=" + base64.b64encode(letters(64).encode()).decode(),
    "Slack": "xo" + "xb-123456789012-1234567890123-" + letters(24),
    "Slack app": "xa" + "pp-1-A012345-1234567890-" + letters(64, HEX),
    "Slack webhook": "https://hooks.slack" + ".com/services/T0ABCDEFG/B0ABCDEFG/" + letters(24),
    "Discord bot": "M" + letters(23) + "." + letters(6) + "." + letters(27),
    "Discord webhook": "https://discord" + ".com/api/webhooks/123456789012345678/" + letters(68),
    "Telegram": "1234567890" + ":AA" + letters(33),
    "Stripe": "sk" + "_live_" + letters(24),
    "Stripe webhook": "wh" + "sec_" + letters(32),
    "Twilio": "S" + "K" + letters(32, HEX),
    "SendGrid": "S" + "G." + letters(22) + "." + letters(43),
    "Mailchimp": letters(32, HEX) + "-" + "us12",
    "Mailgun": "ke" + "y-" + letters(32, HEX),
    "Square": "sq0" + "csp-" + letters(43),
    "Shopify": "shp" + "at_" + letters(32, HEX),
    "npm": "np" + "m_" + letters(36),
    "PyPI": "py" + "pi-AgEIcHlwaS5vcmc" + letters(60),
    "Docker": "dc" + "kr_pat_" + letters(27),
    "DigitalOcean": "do" + "p_v1_" + letters(64, HEX),
    "Databricks": "da" + "pi" + letters(32, HEX),
    "Vault": "hv" + "s." + letters(90),
    "Artifactory": "AK" + "C" + letters(70),
    "Grafana": "gl" + "sa_" + letters(32) + "_" + letters(8, HEX),
    "New Relic": "NR" + "AK-" + letters(27, string.ascii_uppercase + string.digits),
    "Notion": "nt" + "n_" + letters(46),
    "Linear": "lin" + "_api_" + letters(40),
    "Supabase": "sb" + "p_" + letters(40, HEX),
    "JSON Web Token": jwt(),
    "Cerebras": "cs" + "k-" + letters(48, string.ascii_lowercase + string.digits),
    "Jina": "jina" + "_" + letters(60),
    "Tavily": "tvly" + "-dev-" + letters(32),
    "Voyage": "p" + "a-" + letters(43),
    "LlamaCloud": "ll" + "x-" + letters(48),
    "Friendli": "fl" + "p_" + letters(44),
    "ElevenLabs": "s" + "k_" + letters(48, HEX),
    "RunPod": "rp" + "a_" + letters(42, string.ascii_uppercase + string.digits),
    "Neptune": base64.b64encode(
        json.dumps({"api_address": "https://app.neptune.ai", "api_key": letters(36)}).encode()
    ).decode(),
    "Google (new)": "A" + "Q.Ab8" + letters(45),
    "AWS Bedrock": "AB" + "SK" + letters(120),
    "Azure client": letters(3) + "8Q" + "~" + letters(34),
    "Azure DevOps": letters(76) + "AZ" + "DO" + letters(4),
    "Firebase": "AA" + "AAt7x_abc:AP" + "A91b" + letters(134),
    "Heroku": "HR" + "KU-AA" + letters(58),
    "Netlify": "nf" + "p_" + letters(36),
    "Vercel": "vc" + "p_" + letters(56),
    "Fly.io": "Fly" + "V1 fm2_" + letters(120),
    "Terraform": letters(14) + ".at" + "lasv1." + letters(67),
    "SonarQube": "sq" + "p_" + letters(40, HEX),
    "HubSpot": "pa" + "t-na1-1a2b3c4d-1111-2222-3333-444455556666",
    "Brevo": "xkey" + "sib-" + letters(64, HEX) + "-" + letters(16),
    "Dropbox": "s" + "l." + letters(140),
    "Mapbox": "s" + "k.ey" + "J" + letters(60) + "." + letters(22),
    "Plaid": "access-" + "production-1a2b3c4d-1111-2222-3333-444455556666",
}
"""Most are found whatever is around them; `PRIVATE_KEYS` and passwords are in lists of their own."""
PRIVATE_KEYS = {
    "OpenSSH key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "PGP key": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----",
    "PuTTY key": "PuTTY-User-" + "Key-File-3: ssh-ed25519",
    "Kubernetes": "client-key-"
    + "data: "
    + base64.b64encode(b"-----BEGIN RSA PRI" + b"VATE KEY-----" + b"x" * 60).decode(),
    "age key": "AGE-SECRET-" + "KEY-1" + letters(58, string.ascii_uppercase + string.digits),
}
PASSWORDS = {
    "wandb": "wandb" + "_key: " + letters(40, HEX),
    "password": "pass" + "word: gr8-w1nter",
    "passphrase": "pass" + 'phrase = "four-words-and-1-digit!"',
    "token": "hub" + "_token: abcdefgh1234",
    "client secret": "client" + "_secret=" + letters(32),
    "Django": "SECRET" + "_KEY = '" + letters(50) + "'",
    "bearer": "Authorization: " + "Bearer " + letters(24),
    "URL": "git clone https://" + "bob:hunter22" + "@git.corp.com/x",
    "URL without user": "redis://:" + "hunter22x" + "@cache.corp.com:6379/0",
    "netrc": "machine api.wandb.ai login user pass" + "word " + letters(40, HEX),
    "Docker login": json.dumps({"auths": {"ghcr.io": {"auth": base64.b64encode(b"jdoe:" + b"hunter22x9!").decode()}}}),
    "basic": "Authorization: Ba" + "sic " + base64.b64encode(b"jdoe:" + b"hunter22x9").decode(),
    "header": "x-api-" + "key: " + letters(32),
    "cookie": "Cookie: session" + "id=" + letters(32),
    "curl": "curl -" + "u jdoe:hunter22x9 https://x.corp.com",
    "sshpass": "sshpass -" + "p hunter22x9 ssh gpu",
    "option": "python recipes/ppo.py --hub_" + "token abcdefgh1234567 --seed 1",
    "call": "wandb.login(k" + 'ey="' + letters(40, HEX) + '")',
    "environment": 'os.environ["WANDB_API_' + 'KEY"] = "' + letters(40, HEX) + '"',
    "any name": "export MY_SERVICE_TO" + "KEN=" + letters(40, HEX),
    "JSON": json.dumps({"to" + "ken": letters(40)}),
    "camel case": json.dumps({"client" + "Secret": letters(20)}),
    "bold": "**pass" + "word:** hunter22x9",
    "code": "pass" + "word: `hunter22x9`",
    "XML": "<pass" + "word>hunter22x9</pass" + "word>",
    "ODBC": "Server=db;User Id=sa;P" + "wd=hunter22x9;",
    "database": "postgres" + "ql://app:s3cr3t" + "@db.corp.com:5432/runs",
}
TRACES = (  # kind, file, text
    ("home", "train.yaml", "output_dir: /home/jdoe/runs/a"),
    ("home", "notes.md", "see /Users/jdoe/models"),
    ("home", "config.json", json.dumps({"path": "C:\\Users\\jdoe\\model"})),
    ("path", "train.yaml", "dataset_name: /mnt/disk/pairs.jsonl"),
    ("path", "config.json", json.dumps({"cache": "/scratch/team7/cache"})),
    ("path", "log.txt", "read ~/runs/a"),
    ("path", "log.txt", "file:///srv/x"),
    ("path", "log.txt", r"\\server\share\x"),
    ("path", "log.txt", r"D:\work\model"),
    ("home", "config.json", json.dumps({"path": "C:/Users/jdoe/model"})),
    ("home", "page.html", "<a href='file%3A%2F%2F%2Fhome%2Fjdoe%2Fx'>"),
    ("path", "train.yaml", "data: dbfs:/FileStore/jdoe/x.parquet"),
    ("path", "log.txt", "scp jdoe@cluster:/scratch/jdoe/run ."),
    ("path", "log.txt", r"\\wsl$\Ubuntu\work"),
    ("path", "log.txt", "D:/work/model"),
    ("email", "README.md", "questions to jane.doe@corp.com"),
    ("email", "README.md", "write to me@jane-doe.com"),
    ("email", ROWS, json.dumps({"annotator": "Jane Doe <jane.doe@corp.com>"})),
    ("email", ROWS, json.dumps({"votes": [{"annotator": "jane.doe@corp.com", "winner": 0}]})),
    ("address", "train.yaml", "vllm_server: http://192.168.1.20:8000"),
    ("address", "config.json", json.dumps({"host": "10.12.0.7"})),
    ("address", "train.yaml", "host: 100.101.102.103"),
    ("address", "train.yaml", "host: fd12:3456:789a:1::1"),
    ("address", "train.yaml", "url: http://gpu01.corp.internal:8000"),
    ("remote-code", "train.yaml", "trust_remote_code: true"),
    ("remote-code", "README.md", "python x.py --trust-remote-code"),
    ("remote-code", "config.json", json.dumps({"auto_map": {"AutoModel": "modeling.X"}})),
)
TEXT_FILES = ("train.yaml", "report.json", "rows.jsonl", "README.md", "notes.txt", "setup.toml", "run.ipynb", ROWS)


def in_text(file: str, text: str) -> bytes:
    """A text file, or a row, that holds the text as a value."""
    if file in (ROWS, "rows.jsonl"):
        row = {"prompt": "How do I log in?", "completions": [f"Use this:\n{text}", "Ask the owner."]}
        return (json.dumps({"prompt": "Hello"}) + "\n" + json.dumps(row)).encode()
    if file == "run.ipynb":
        return json.dumps({"cells": [{"source": ["import os\n", text]}]}, indent=1).encode()
    if file == "report.json":
        return json.dumps({"seed": 0, "notes": {"text": text}}, indent=2).encode()
    return f"seed: 0\n\n{text}\n".encode()


# Containers: the same text inside other kinds of files


def picture(format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format, **options)
    return stream.getvalue()


def exif(text: str) -> Image.Exif:
    data = Image.Exif()
    data[0x010E] = text  # ImageDescription
    return data


def png(text: str, zip: bool = False, international: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    add = info.add_itxt if international else info.add_text
    add("Comment", text, zip=zip)
    return picture("PNG", pnginfo=info)


def tokenizer_json(added: str = "<pad>", vocabulary: tuple[str, ...] = ("a", "b")) -> bytes:
    model = {"type": "BPE", "vocab": {piece: k for k, piece in enumerate(vocabulary)}, "merges": [["a", "b"]]}
    content = {"added_tokens": [{"id": 9, "content": added}], "normalizer": None, "model": model}
    return json.dumps(content, indent=2).encode()


def field(number: int, content: bytes) -> bytes:
    """A field of a Protocol Buffers message: number, length, content (here less than 16 kB)."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def sentencepiece(corpus: str, pieces: tuple[str, ...] = ("<unk>", "▁the")) -> bytes:
    """A SentencePiece model: pieces with a score of 0, and the file that it was trained on."""
    score = b"\x15\0\0\0\0"
    message = b"".join(field(1, field(1, piece.encode()) + score) for piece in pieces)
    return message + field(2, field(1, corpus.encode()) + field(2, b"m"))


def containers(text: str) -> dict[str, bytes]:
    tensors = {"w": torch.zeros(2)}
    return {
        "text.png": png(text),
        "compressed.png": png(text, zip=True),
        "international.png": png(text, international=True, zip=True),
        "profile.png": picture("PNG", icc_profile=b"x" * 128 + text.encode()),
        "exif.png": picture("PNG", exif=exif(text)),
        "comment.jpg": picture("JPEG", comment=text.encode()),
        "exif.jpg": picture("JPEG", exif=exif(text)),
        "exif.webp": picture("WEBP", exif=exif(text)),
        "xmp.webp": picture("WEBP", xmp=f"<x>{text}</x>".encode()),
        "comment.gif": picture("GIF", comment=text.encode()),
        "model.safetensors": save_safetensors(tensors, metadata={"from": text}),
        "tokenizer_config.json": json.dumps({"chat_template": "{{ m }}", "note": text}).encode(),
        "chat_template.jinja": f"{{# {text} #}}{{{{ messages }}}}".encode(),
        "tokenizer.json": tokenizer_json(added=text),
        "merges.txt": f"#version: 0.2 - {text}\na b\n".encode(),
        "vocab.txt": f"[PAD]\nmade with {text}\n".encode(),
        "spiece.model": sentencepiece(corpus=text),
    }


def leaks() -> list[Seed]:
    """Each secret in one kind of text file, each kind of text file and of container with a token and a home."""
    seeds = []
    groups = (("token", SECRETS), ("private-key", PRIVATE_KEYS), ("credential", PASSWORDS))
    for kind, group in groups:
        for number, (what, text) in enumerate(group.items()):
            files = [file for file in TEXT_FILES if kind != "credential" or file not in (ROWS, "rows.jsonl")]
            file = files[number % len(files)]
            seeds.append(Seed(kind, what, file, in_text(file, text)))
    seeds += [
        Seed(kind, text, file, in_text(file, text) if file != ROWS else text.encode()) for kind, file, text in TRACES
    ]
    for kind, text in (("token", "--token " + SECRETS["Hugging Face"]), ("home", "python /home/jdoe/plots/run.py")):
        seeds += [Seed(kind, text, file, content) for file, content in containers(text).items()]
    return seeds


# Harmless


_SHA256 = letters(64, HEX)
_HARMLESS = {
    "README.md": (
        "Revision `9f1c0b7d2e3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c`, sha256 " + _SHA256,
        "reward/nat, 1/2, and/or, TCP/IP, 24/7 and </s> or <br/>",
        "https://huggingface.co/a/b/resolve/main/model.safetensors, hf://x/y and arXiv:2203.02155",
        "`python recipes/ppo.py --output_dir runs/ppo --dataset_name <path>/pairs.jsonl`",
        'The server answers `POST /v1/chat/completions` and `/api/models/a/x`; `-H "Authorization: Bearer $TOKEN"`',
        "#!/usr/bin/env python, > /dev/null, /etc/hosts and /proc/cpuinfo are the same everywhere",
        "Set `HF_TOKEN` or `hub_token: <HUB_TOKEN>`; `OPENAI_API_KEY=your_key_here`",
        'client = OpenAI(api_key=os.environ["OPENAI_API_KEY"], timeout=30)',
        "password: the one that you chose; secret: keep it to yourself",
        "The secret: patience. The key: remembering names. A token: something that stands for something.",
        "@article{ouyang2022training, journal={arXiv}} git@github.com:a/b you@example.com noreply@github.com",
        "scores = q@k.transpose(1, 2); out = x@self.weight.T",
        "torch 2.13.0+cpu, cuda 12.10.1.2, driver 535.104.05, 10 of 20",
        "localhost:8000 and 127.0.0.1:8000 are this machine, whichever it is; 0.0.0.0 is all",
        "`trust_remote_code=False`, `--trust_remote_code false`",
        "posted in /r/AskReddit by /u/someone; r/relationships",
        "[a link](https://user.github.io/path/to/page) and ![plot](evaluation.png)",
        "sk-learn, scikit-learn and sk-toggleable__content-of-a-longer-name are names of classes",
        'HfApi(token="hf_' + "x" * 34 + '"), api_key="sk-' + "x" * 40 + '"',
        "password: `********`, `--password <PASSWORD>`, `--hub_token $HF_TOKEN`, --hub_token YOUR_TOKEN_HERE_12",
        "the key of AWS's documentation is AK" + "IAIOSFODNN7EXAMPLE",
        "[main](/alice/polite/blob/main/README.md), <img src='/alice/polite/resolve/main/loss.png'/>",
        "docker run -u 1000:1000 image; curl -u user:password https://example.com; Basic Attention and a cookie: crisp",
        "http://host.docker.internal:8000, 3:/4, :/ and GET:/v1/models",
        "integrity `sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=`",
        "wandb.login(key=os.environ['WANDB_API_KEY'])",
        "sk-SK, pa-IN, nfp_rate_of_something_long, sl.pytorch.distributed.elastic.multiprocessing.api",
        "pypi-release-of-a-very-long-name, glpat and hf_hub_download(repo_id, filename)",
    ),
    "train.yaml": (
        "model_name_or_path: HuggingFaceTB/SmolLM2\nmodel_revision: 12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "hub_token: null\npush_to_hub_token: ''\nhub_model_id: alice/polite",
        "lora_target_modules: [q_proj, k_proj, v_proj]\nmodules_to_save: [embed_tokens]",
        "eos_token: <|endoftext|>\npad_token: '<|pad|>'\nstop_token: eos_token_id",
        "report_to: wandb\nwandb_project: reward-models-of-2026\nrun_name: r16-a32-b0.9-lr1e-05",
        "output_dir: <path>/out\nlogging_dir: runs/Nov30_08-10-43",
        "cache_key: " + _SHA256 + "\nweights_digest: " + letters(16, HEX),
        "sort_key: prompt_length_in_tokens\nprimary_key: comparison_identifier",
        "optim_args: betas=(0.9,0.999),eps=1e-08",
        "token: null\nuse_auth_token: true\nnext_token: 12345678901234567890\ntoken_type: completion_only_v2",
        "key: " + letters(40, HEX) + "\nsecret_word_of_the_game: banana-split-sundae",
        "api_key: ${API_KEY}\npassword: '********'\ntoken: ...",
    ),
    "config.json": (
        json.dumps({"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "transformers_version": "5.23.0"}),
        json.dumps({"trust_remote_code": False, "auto_mapping": None, "hub_token": None}),
        json.dumps({"id": "3f2504e0-4f89-41d3-9a0c-0305e82c3301", "etag": letters(32, HEX)}),
        json.dumps(
            {"quantization_config": {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}}
        ),
        json.dumps({"tokens_per_second": 12345678.9, "secret_santa": "a game", "keys": ["prompt", "completion"]}),
    ),
    "tokenizer_config.json": (
        json.dumps({"chat_template": "{% for m in messages %}{{ 'A:\n\n' + m['content'] }}{% endfor %}\nuser: what"}),
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1000000000000000019884624838656}),
        json.dumps({"added_tokens_decoder": {"0": {"content": "<|im_start|>"}, "1": {"content": "</tool_call>"}}}),
    ),
    "tokenizer.json": (
        tokenizer_json(
            vocabulary=("/usr/local/models", "a@b.com", "/home/", "C:\\Users\\x", "password:", "10.0.0.1")
        ).decode(),
        tokenizer_json(vocabulary=("://", "Ġ/", "://user:", "/root", "~/a", "trust_remote_code=True")).decode(),
    ),
    "vocab.json": (json.dumps({"/mnt/data/x": 1, "bob@corp.com": 2, "secret:hunter22x": 3}),),
    "merges.txt": ("#version: 0.2\n/ home\n/h ome/bob\n@ corp.com\n",),
    "vocab.txt": ("[PAD]\n/home/bob\njane@corp.com\n##ing\n",),
    "tokenizer.model": ("L2hvbWUvYm9i 12\n/w== 13\n/a/b+c/d 14\n",),
    ROWS: (
        json.dumps({"prompt": "Where are logs?", "completions": ["In /var/log/nginx/access.log", "/home/you/logs"]}),
        json.dumps({"prompt": "My router?", "completions": ["Open 192.168.1.1", "Try http://10.0.0.138/login.html"]}),
        json.dumps({"prompt": "Set a password", "completions": ["password: Tr0ub4dor&3", "secret: use correct horse"]}),
        json.dumps({"prompt": "Write a mail", "completions": ["Dear Ann, write to ann.lee@corp.com. Bob", "No."]}),
        json.dumps({"prompt": "bash", "completions": ["export API_KEY=abc12345; cd ~/projects/x", r"C:\Users\me\a"]}),
        json.dumps({"prompt": "What is UNC?", "completions": [r"\\server\share\file", "A college in Chapel Hill"]}),
        json.dumps({"prompt": "Load it", "completions": ["from_pretrained(x, trust_remote_code=True)", "No."]}),
        json.dumps({"prompt": "curl?", "completions": ["curl ftp://user:password@host.com/file", "wget"]}),
        json.dumps(
            {"prompt": "key?", "completions": ["sk-" + "1234567890abcdef1234567890abcdef", "gh" + "p_" + "x" * 36]}
        ),
        json.dumps({"prompt": "connect", "completions": ["postgresql://user:pass123@localhost:5432/x", "No."]}),
        json.dumps({"id": "toolu_01A09q90qw90lq917835lq9", "call": "call_9pw1qnYScqvGrCH58HWCvFH6"}),
        json.dumps({"prompt": "长" * 60, "completions": ["好" * 60, "x" * 60]}, ensure_ascii=False),
    ),
    "rows.jsonl": (
        json.dumps({"step": 1, "text": "the file /etc/passwd holds root:x:0:0 and bob@corp.com asked"}),
        json.dumps({"digest": _SHA256, "id": "chatcmpl-" + letters(29)}),
    ),
    "LICENSE": ("Copyright (c) 2026 Jane Doe. Questions: LlamaUseReport@meta.com",),
    "samples.md": ("> Save it in /home/alice/notes.txt, password: hunter22x",),
    "chat_template.jinja": (
        "{% if tools %}<tool_call></tool_call>{% endif %}{{ '<|assistant|>\\n' }}",
        "{%- set ns = namespace(path='a/b') -%}{{ messages[0]['content'] | trim }}",
    ),
}


def harmless() -> list[Seed]:
    seeds = []
    for file, texts in _HARMLESS.items():
        seeds += [Seed("", text[:60], file, text.encode()) for text in texts]
    seeds += [
        Seed("", "a plot", "plot.png", png("made by a test")),
        Seed("", "a plot by matplotlib", "loss.png", png("Matplotlib version3.11.0, https://matplotlib.org/")),
        Seed("", "a photograph", "photo.jpg", picture("JPEG", comment=b"10 x 10, 24/7")),
        Seed("", "noise", "noise.png", _noise()),
        Seed("", "pieces", "spiece.model", sentencepiece("corpus.txt", ("/home/", "a@b.com", "▁/usr/x"))),
        Seed("", "weights", "w.safetensors", save_safetensors({"w": torch.zeros(2)}, metadata={"format": "pt"})),
    ]
    return seeds


def _noise() -> bytes:
    """Pixels of random bytes, which compress to random bytes."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(3 * 256 * 256)).save(stream, "PNG")
    return stream.getvalue()
