"""Rules of the leak scanner: one pattern for each kind of finding, and formats of tokens that detect-secrets lacks."""

import re
from typing import NamedTuple

# Any secret contains a word of 16 such characters, which ordinary text seldom does: other lines need no closer look.
LONG_WORD = re.compile(r"[A-Za-z0-9_.+/=-]{16}")


class Rule(NamedTuple):
    """Rule for one kind of finding.

    Attributes:
        kind: Kind of finding.
        pattern: What is found.
        hints: Any line with a finding contains one of these texts, in lower case. Looking for them is faster.
        name: What a secret looks like. Empty for other kinds.
    """

    kind: str
    pattern: re.Pattern
    hints: tuple[str, ...]
    name: str = ""


# Formats as the providers document them, and as gitleaks and TruffleHog know them.
_TOKENS: dict[str, tuple[str, str]] = {
    "Hugging Face token": ("hf_ api_org_", r"hf_[A-Za-z0-9]{16,}|hf_oauth_\S{8,}|api_org_\w{20,}"),
    "OpenAI or Anthropic key": ("sk-", r"sk-(?=[\w-]{0,200}\d)[\w-]{20,}"),
    "Groq key": ("gsk_", r"gsk_[A-Za-z0-9]{40,}"),
    "Replicate token": ("r8_", r"r8_[A-Za-z0-9]{32,}"),
    "xAI key": ("xai-", r"xai-\w{40,}"),
    "Perplexity key": ("pplx-", r"pplx-[A-Za-z0-9]{40,}"),
    "NVIDIA key": ("nvapi-", r"nvapi-[\w-]{40,}"),
    "Fireworks key": ("fw_", r"fw_(?=[A-Za-z0-9]{0,200}\d)[A-Za-z0-9]{20,}"),
    "Together key": ("tgp_v1_", r"tgp_v1_[\w-]{40,}"),
    "Pinecone key": ("pcsk_", r"pcsk_\w{30,}"),
    "LangSmith key": ("lsv2_", r"lsv2_[ps][tk]_\w{30,}"),
    "Weights & Biases key": ("wandb_v1_", r"wandb_v1_\w{40,}"),
    "Kaggle token": ("KGAT_", r"KGAT_[a-f0-9]{32}"),
    "GitHub fine-grained token": ("github_pat_", r"github_pat_\w{20,}"),
    "GitLab token": ("gl", r"gl(?:pat|ptt|dt|rt|cbt|soat|ft|imt|agent|oas|ffct)-[\w-]{16,}"),
    "Atlassian token": ("ATATT3", r"ATATT3[\w=-]{50,}"),
    "Slack token": ("xox xapp-", r"xox[abeoprs]-(?=[\w-]{0,200}\d)[\w-]{12,}|xapp-\d-[\w-]{20,}"),
    "Discord webhook": ("/api/webhooks/", r"https://discord(?:app)?\.com/api/webhooks/\d{17,}/[\w-]{60,}"),
    "Teams webhook": (".webhook.office.com", r"https://[\w-]+\.webhook\.office\.com/webhookb2/[\w@/-]{40,}"),
    "Telegram bot token": (":AA", r"\d{8,10}:AA[\w-]{33}"),
    "Google key": (
        "AIza AQ.Ab ya29. GOCSPX- 1//0",
        r"AIza[\w-]{30,}|AQ\.Ab[\w-]{40,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|1//0[\w-]{30,}",
    ),
    "Azure key": ("Key= sig=", r"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}=*|\bsig=[A-Za-z0-9%]{43,}%3[dD]"),
    "DigitalOcean token": ("_v1_", r"do[opr]_v1_[a-f0-9]{64}"),
    "Databricks token": ("dapi", r"dapi[a-f0-9]{32}"),
    "Vault token": ("hv", r"hv[sb]\.[\w-]{24,}"),
    "Supabase token": ("sbp_", r"sbp_[a-f0-9]{40}"),
    "PlanetScale token": ("pscale_", r"pscale_(?:tkn|pw|oauth)_[\w.-]{32,}"),
    "Docker token": ("dckr_", r"dckr_[po]at_[\w-]{20,}"),
    "PyPI token": ("pypi-", r"pypi-(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])[\w-]{16,}"),
    "RubyGems key": ("rubygems_", r"rubygems_[a-f0-9]{48}"),
    "Stripe test key or secret": (
        "k_test_ k_prod_ whsec_",
        r"[rs]k_(?:test|prod)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{24,}",
    ),
    "Square token": ("sq0atp- EAAA", r"sq0atp-[\w-]{22}|EAAA[\w-]{50,}"),
    "Shopify token": ("shp", r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}"),
    "Linear key": ("lin_", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}"),
    "Notion token": ("ntn_ secret_", r"(?:ntn|secret)_[A-Za-z0-9]{43,}"),
    "Airtable token": ("pat", r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}"),
    "Postman key": ("PMAK-", r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}"),
    "Doppler token": ("dp.", r"dp\.(?:pt|st|ct|sa|scim)\.(?:[\w-]+\.)?[A-Za-z0-9]{40,}"),
    "Mailgun key": ("key-", r"key-[a-f0-9]{32}"),
    "Grafana token": ("glsa_ glc_", r"glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}|glc_[A-Za-z0-9+/=]{32,}"),
    "New Relic key": ("NRAK-", r"NRAK-[A-Z0-9]{27}"),
    "Sentry token": ("sntry", r"sntry[su]_[A-Za-z0-9+/=_]{40,}"),
    "Tailscale key": ("tskey-", r"tskey-[a-z]+-\w{10,}-\w{20,}"),
    "Figma token": ("figd_ figo_", r"fig[do]_[\w-]{40,}"),
    "Cerebras key": ("csk-", r"csk-[a-z0-9]{40,}"),
    "Jina key": ("jina_", r"jina_\w{50,}"),
    "Tavily key": ("tvly-", r"tvly-(?:dev-|prod-)?[A-Za-z0-9]{20,}"),
    "Voyage key": ("pa-", r"pa-(?=[\w-]{0,40}\d)(?=[\w-]{0,40}[A-Z])[\w-]{40,}"),
    "LlamaCloud key": ("llx-", r"llx-[A-Za-z0-9]{40,}"),
    "Friendli token": ("flp_", r"flp_[A-Za-z0-9]{40,}"),
    "ElevenLabs key": ("sk_", r"sk_[a-f0-9]{48}"),
    "Anyscale key": ("esecret_", r"esecret_[A-Za-z0-9]{20,}"),
    "RunPod key": ("rpa_", r"rpa_[A-Z0-9]{40,}"),
    "Modal secret": ("as- ws-", r"[aw]s-(?=[A-Za-z]{0,20}\d)(?=[a-z\d]{0,20}[A-Z])[A-Za-z0-9]{22}\b"),
    "Neptune token": ("eyJhcGlfYWRkcmVzcyI6", r"eyJhcGlfYWRkcmVzcyI6[\w+/=-]{40,}"),
    "Prefect key": ("pnu_ pnb_", r"pn[ub]_[A-Za-z0-9]{36}"),
    "AWS Bedrock key": ("ABSK", r"ABSK[A-Za-z0-9+/]{100,}"),
    "Azure client secret": ("Q~", r"[\w.~-]{3}\dQ~[\w.~-]{31,}"),
    "Azure DevOps token": ("AZDO", r"[A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4}"),
    "Firebase key": (":APA91b", r"AAAA[\w-]{7}:APA91b[\w-]{100,}"),
    "Heroku key": ("HRKU-", r"HRKU-[\w-]{36,}"),
    "Netlify token": ("nf", r"nf[bcopu]_[A-Za-z0-9]{36}"),
    "Vercel token": ("vc", r"vc[aikpr]_[A-Za-z0-9]{40,}"),
    "Fly.io token": ("fm", r"fm[12][ar]?_[A-Za-z0-9+/=]{60,}"),
    "Render key": ("rnd_", r"rnd_[A-Za-z0-9]{32}"),
    "Pulumi token": ("pul-", r"pul-[a-f0-9]{40}"),
    "Terraform token": (".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,}"),
    "CircleCI token": ("CCIPAT_", r"CCIPAT_[A-Za-z0-9]{22}_[a-f0-9]{40}"),
    "SonarQube token": ("sq", r"sq[apu]_[a-f0-9]{40}"),
    "Sourcegraph token": ("sgp_", r"sgp_(?:[a-f0-9]{16}_|local_)?[a-f0-9]{40}"),
    "Dropbox token": ("sl.", r"sl\.(?:u\.)?[\w-]{120,}"),
    "HubSpot token": ("pat-", r"pat-[a-z]{2}\d-[a-f0-9-]{36}"),
    "Brevo key": ("xkeysib-", r"xkeysib-[a-f0-9]{64}-\w{16}"),
    "Mapbox token": ("sk.eyJ", r"sk\.eyJ[\w-]{40,}\.[\w-]{20,}"),
    "PostHog key": ("phx_", r"phx_[A-Za-z0-9]{40,}"),
    "Plaid token": ("access-", r"access-(?:sandbox|development|production)-[a-f0-9-]{36}"),
    "LaunchDarkly key": ("api- sdk-", r"(?:api|sdk)-[a-f0-9]{8}(?:-[a-f0-9]{4}){3}-[a-f0-9]{12}"),
    "Contentful token": ("CFPAT-", r"CFPAT-[\w-]{40,}"),
    "Meta token": ("EAA", r"EAA[A-Za-z0-9]{150,}"),
}
"""What it is -> texts, one of which is in each of these tokens (looking for them is faster), and the pattern."""
_BEGINS = r"(?:(?<![A-Za-z0-9_])|(?<=\\n))"
TOKEN_RULES = tuple(
    Rule("token", re.compile(f"{_BEGINS}(?:{pattern})"), tuple(hints.split()), name)
    for name, (hints, pattern) in _TOKENS.items()
)
"""A rule for each of these tokens. Unlike those of other rules, the hints are in the case of the token."""
TOKENS = re.compile(f"{_BEGINS}(?:{'|'.join(pattern for _, pattern in _TOKENS.values())})")
"""All of these tokens."""
PLACEHOLDER = re.compile(
    r"(?i)EXAMPLE|(.)\1{11}|(?:1234567890|0123456789)abcdef|SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
)
"""In a token of documentation: those of AWS, a repeated character, all digits in order, and that of jwt.io."""

_ENCODED_KEY = "LS0tLS1CRUdJTi(?:BQUklWQVRF|BSU0Eg|BFQyBQ|BPUEVOU1NI|BFTkNSWVBU)"
"""The beginning of a private key in base64, as in the configuration of Kubernetes."""
PRIVATE_KEY = Rule(
    "private-key",
    re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY|PuTTY-User-Key-File-\d:|AGE-SECRET-KEY-1[0-9A-Z]{50,}"
        rf"|{_ENCODED_KEY}[A-Za-z0-9+/]{{16}}"
    ),
    ("private key", "-key-", "ls0tls1crudj"),
    "private key",
)

# Values that stand for a secret: a placeholder, a variable, a type. Words of prose have no digit or symbol.
_NO_VALUE = (
    r"(?!null\b|none\b|true\b|false\b|<|\$|\{|\[|%|\*{3}|\.{3}|x{4}|y{4}|0{8}|your?[-_]|my[-_]|the[-_]|some[-_]|insert"
    r"|replace|change|example|placeholder|redacted|hidden|removed|dummy|fake|optional|str\b|env\b|os\.|self\.|args\."
    r"|config\.|process\.|secrets\.|settings\.|(?:hf_|sk-)?(?:x{8}|a{8}|0{8})|[\w.]{1,60}\()"
)
_VALUE = r"(?:(?=[^\s\"'`,}{]{0,200}[\d!@#$%^&*+/=])[^\s\"'`,}{]{8,}|[^\s\"'`,}{]{16,})"
_RANDOM = r"(?=[\w.+/=~-]{0,200}\d)(?=[\w.+/=~-]{0,200}[A-Za-z])[\w.+/=~-]{20,}"
_ASSIGNED = r"[\"'`\]]*\s*(?::=|=>|[:=])\s*(?:\*\*\s*)?[\"'`]{0,3}"
_SERVICES = "wandb|comet|neptune|clearml|openai|anthropic|azure|aws|google|mistral|cohere|together|hf|huggingface"
_KEY_NAMES = (
    r"aws_secret_access_key|api[_-]?key|(?:client|app|consumer|webhook)[_-]?secret"
    r"|(?<![a-z])secret(?:[_-]?key|_access_key|_value)?|passw(?:or)?d|passphrase|(?<![a-z])pwd(?![\"'\s:=]*[/~.])"
    r"|(?:access|auth|hub|hf|push_to_hub|private|refresh|bearer|bot|api)[_-]?token"
    rf"|(?:{_SERVICES}|account|storage|access|auth|service|license|signing|encryption|master|private|shared)[_-]?key"
)
_NO_PASSWORD = r"(?!(?:password|passwd|pass|pw|pwd|token|secret|x+|\*+|\.\.\.|<[^>]*>|\$\{?\w+\}?|\{\w*\}|%\w+%)@)"
URL_PASSWORD = Rule(
    "credential",
    re.compile(rf"://[^\s/:@'\"]{{0,80}}:{_NO_PASSWORD}[^\s/@'\"]{{1,200}}@(?!localhost\b|127\.|0\.0\.0\.0)[\w\[]"),
    ("://",),
    "password in a URL",
)


def _credential(name: str, hints: tuple[str, ...], *patterns: str) -> Rule:
    return Rule("credential", re.compile("(?i)" + "|".join(patterns)), hints, name)


CREDENTIALS = (
    _credential(
        "header of a request",
        ("bearer", "authorization", "cookie"),
        r"\bbearer\s+(?=[\w.~+/-]{0,200}\d|[\w.~+/-]{16})[\w.~+/-]{12,}",
        r"\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|token|api-?key)\s+[\w.~+/=-]{12,}",
        r"\bcookie[\"']?\s*:\s*[\"']?[\w-]{1,60}=(?=[^\s;]{0,200}\d)[^\s;\"']{16,}",
    ),
    URL_PASSWORD,
    _credential(
        "password or key",
        ("key", "secret", "passw", "passphrase", "token", "pwd"),
        rf"(?:{_KEY_NAMES}){_ASSIGNED}{_NO_VALUE}{_VALUE}",
    ),
    _credential(
        "password or key of a command",
        ("--", "login", "sshpass", "curl", "<passw", "password "),
        rf"--[\w-]{{0,60}}(?:{_KEY_NAMES})\s+[\"']?(?!-){_NO_VALUE}{_VALUE}",
        rf"\bcurl\b.{{0,200}}?\s(?:-u|--user)[ =]?[\"']?(?!user(?:name)?:)[\w.@+-]{{1,60}}:{_NO_VALUE}[^\s\"':@]{{6,}}",
        rf"\bsshpass\s+-p\s*[\"']?{_NO_VALUE}\S{{6,}}",
        r"\blogin\([^)\"']{0,40}[\"'][a-f0-9]{32,}[\"']",
        rf"\blogin\s+\S{{1,100}}\s+password\s+{_NO_VALUE}\S{{8,}}|^\s*password\s+[a-f0-9]{{40}}$",
        rf"<passw(?:or)?d>\s*{_NO_VALUE}[^\s<]{{8,}}",
    ),
    Rule(
        "credential",  # of any name, if the value looks random
        re.compile(
            rf"(?:\b[A-Z][A-Z0-9_]{{0,60}}_(?:TOKEN|KEY|SECRET|PASSWORD|PWD|PAT)|(?<![\w-])(?:token|auth)){_ASSIGNED}"
            rf"{_NO_VALUE}{_RANDOM}"
        ),
        ("token", "key", "secret", "pass", "pwd", "_pat", "auth"),
        "password or key",
    ),
)

# Folders that every system has, and routes of web services: they tell nothing about a machine.
_USUAL = (
    r"(?:usr/(?:bin|sbin|lib|share|include|local/(?:bin|lib|share))|s?bin|dev|etc|proc|sys|v\d+|api)/|[ru]/"
    r"|[\w.-]+/[\w.-]+/(?:resolve|blob|tree|raw)/"  # a link to a file on the Hub
)
_PATHS = (  # two or more parts, a home, a drive or a share; not the rest of a URL, a closing tag or Reddit's /r/
    rf"(?<![\w./\\<>~-])(?!/(?:{_USUAL}))(?:/[\w.@-]+){{2,}}"
    r"|(?<![\w.:/\\<>~-])/(?:root|home|tmp|mnt|data|scratch)\b"
    r"|(?<!\w)~\w*/\w|\bfile:/+\w|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Windows|home|(?![nrt])\w{2,}\\{1,2}\w)"
    r"|(?<!\\)\\\\\w[\w.$-]+\\\w"
)
_NO_ADDRESS = (  # placeholders, and `x@self.weight` in code
    r"(?!git@|no-?reply@|(?:you|your|user|username|name|someone|email|foo)@"
    r"|[\w.+-]+@(?:example|self|users\.noreply)\.)"
)
HOME = Rule(
    "home",
    re.compile(
        r"(?:(?<![\w.])(?:/home/|/Users/|/root\b|[A-Za-z]:\\{1,2}Users\\{1,2})|%2[Ff](?:home|Users)%2[Ff])[\w.-]*"
    ),
    ("/", "\\", "%2f"),
)
EMAIL = re.compile(
    rf"(?<![\w.+/-]){_NO_ADDRESS}[\w.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{{2,}}\b(?!\s*\(|\.\w)"
)
TRACES = (
    HOME,
    Rule("email", EMAIL, ("@",)),
    Rule(
        "address",
        re.compile(
            r"(?<![\d.])(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01])|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7]))"
            r"(?:\.\d{1,3}){2}(?![\d.])|(?<![\w:])f[cd][0-9a-f]{2}:(?:[0-9a-f]{1,4}:|:){1,6}[0-9a-f]{1,4}(?![\w:])"
            r"|://(?!host\.docker\.)[\w.-]+\.(?:internal|local|lan|corp|intranet)\b(?![.-]\w)"
        ),
        ("10.", "192.168.", "172.", "100.", "fc", "fd", "://"),
    ),
    Rule(
        "remote-code",
        re.compile(
            r"(?i)trust[_-]remote[_-]code[\"']?\s*[:=]\s*[\"']?(?:true|1|yes|on)\b|[\"']?auto_map[\"']?\s*:"
            r"|--trust[_-]remote[_-]code\b(?![\s=]+[\"']?(?:false|f|no|n|off|0)\b)"
        ),
        ("trust_remote_code", "trust-remote-code", "auto_map"),
    ),
    Rule("path", re.compile(_PATHS), ("/", "\\")),
)
"""What text should not tell about a machine and its user, whatever the machine."""

IDENTIFIER = Rule("email", re.compile(rf'(?<=")(?:[^"<>@]{{0,60}}<)?(?:{EMAIL.pattern})>?(?=")'), ("@",))
"""An e-mail address that is a whole value, such as the name of an annotator, not part of a text."""
