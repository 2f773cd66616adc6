"""Markdown of prompts, completions and instructions as HTML that cannot run anything, and tasks as JSON for the page.

Two walls stand behind each other: markdown-it-py escapes every HTML tag of the text and refuses links with dangerous
schemes, and nh3 then removes what is not on the list below. The page's Content-Security-Policy is the third wall.

Nothing that a judge should see may get lost on the way. So images are shown as links, link definitions stay text, and a
text from which Markdown would drop a word (too deeply nested, or in a cell beyond the last column) is shown as it is.
"""

import html
import re
import threading
from collections import OrderedDict
from urllib.parse import unquote

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

MAX_MARKDOWN_CHARACTERS = 100_000  # longer texts are shown plain
MAX_BRACKETS = 3_000  # with more "[", trying them all as links takes seconds
MAX_CELLS = 20_000  # lines times "|" of one line: the parser fills up every row of a table to its widest one
MAX_NESTING = 60  # levels of quotes and lists; markdown-it-py drops what is deeper, so we show such a text plain
HEADING_SHIFT = 2  # "# Title" of a text becomes <h3>: <h1> and <h2> belong to the page

ALLOWED_TAGS = frozenset(
    "p br hr h1 h2 h3 h4 h5 h6 strong em s code pre blockquote ul ol li a table thead tbody tr th td".split()
)
ALLOWED_ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}
# Set on every such tag. A block of code may scroll sideways, which needs the focus of the keyboard.
SET_ATTRIBUTES = {"a": {"target": "_blank"}, "pre": {"tabindex": "0"}}
LINK_REL = "noopener noreferrer nofollow"
LINK_SCHEMES = frozenset({"http", "https", "mailto"})

_WORD = re.compile(r"[^\W_]+")
_TAG = re.compile(r"<[^>]*>")  # in our own HTML, where every other "<" and ">" is escaped
_LINK_WITHOUT_TEXT = re.compile(r"<a [^>]*>\s*</a>")

_cleaner = nh3.Cleaner(
    tags=set(ALLOWED_TAGS),
    attributes={tag: set(names) for tag, names in ALLOWED_ATTRIBUTES.items()},
    set_tag_attribute_values=SET_ATTRIBUTES,
    link_rel=LINK_REL,
    url_schemes=set(LINK_SCHEMES),
    url_relative="deny",  # also of //other.example
)


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    # Without "image", ![text](url) is an exclamation mark and a link. Without "reference", "[a]: b" stays visible.
    parser.disable(["image", "reference", "html_block", "html_inline"])
    return parser


_parser = _make_parser()


def render_plain(text: str) -> str:
    """The text itself, escaped, with its line breaks and spaces: HTML that holds one `<pre>`."""
    return f'<pre tabindex="0">{html.escape(_encodable(text))}</pre>'


def render_markdown(text: str) -> str:
    """Markdown as clean HTML.

    Args:
        text: any text. One of more than `MAX_MARKDOWN_CHARACTERS` characters, or one for which Markdown would take
            long or leave something out, is returned as plain text in a `<pre>`.
    """
    text = _encodable(text)
    if len(text) > MAX_MARKDOWN_CHARACTERS or _is_slow(text):
        return render_plain(text)

    tokens = _parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            level = int(token.tag[1:])
            token.tag = f"h{min(level + HEADING_SHIFT, 6)}"
    rendered = _cleaner.clean(_parser.renderer.render(tokens, _parser.options, {}))
    if _is_cut_off(tokens) or _is_invisible(text, rendered) or _lacks_words(text, tokens, rendered):
        return render_plain(text)
    return rendered


def _encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_slow(text: str) -> bool:
    lines = text.splitlines()
    most_bars = max((line.count("|") for line in lines), default=0)
    return text.count("[") > MAX_BRACKETS or most_bars * len(lines) > MAX_CELLS


def _is_cut_off(tokens: list[Token]) -> bool:
    """Whether some block is so deep that the parser may have dropped what is in it."""
    return any(token.level >= MAX_NESTING - 1 for token in tokens)


def _is_invisible(text: str, rendered: str) -> bool:
    """Whether nothing would be seen of a text, such as "#", or of a link, such as "[](https://example.org)"."""
    if _LINK_WITHOUT_TEXT.search(rendered):
        return True
    return bool(text.strip()) and not html.unescape(_TAG.sub("", rendered)).strip()


def _lacks_words(text: str, tokens: list[Token], rendered: str) -> bool:
    """Whether a word or number of the text is missing in its HTML, attributes included."""
    shown = _words(rendered) | _words(html.unescape(rendered)) | _words(unquote(rendered))
    for token in tokens:
        # Numbers of lists are in the layout, and the language of a code block (its first word) need not be seen.
        first_word = token.info.split(maxsplit=1)[:1]
        shown |= _words("".join(first_word))

    if not _words(text) - shown:
        return False
    # "&copy;" is shown as its sign, so "copy" is not missing.
    return bool(_words(html.unescape(text)) - shown)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))


class RenderCache:
    """`render_markdown` with a memory of limited size. The least recently used texts are forgotten first.

    Args:
        max_characters: of all texts and their HTML together.
    """

    def __init__(self, max_characters: int = 16_000_000):
        self.max_characters = max_characters
        self._characters = 0
        self._rendered: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def render(self, text: str) -> str:
        """The HTML of a text, as `render_markdown`."""
        with self._lock:
            known = self._rendered.get(text)
            if known is not None:
                self._rendered.move_to_end(text)
                return known

        rendered = render_markdown(text)  # outside of the lock: it may take long
        with self._lock:
            self._remember(text, rendered)
        return rendered

    def _remember(self, text: str, rendered: str) -> None:
        if text in self._rendered or len(text) + len(rendered) > self.max_characters:
            return
        self._rendered[text] = rendered
        self._characters += len(text) + len(rendered)
        while self._characters > self.max_characters:
            old_text, old_rendered = self._rendered.popitem(last=False)
            self._characters -= len(old_text) + len(old_rendered)


def show_task(shown, cache: RenderCache) -> dict:
    """What the page may know of a task: texts in display order. Neither policies nor the right answer of a gold one.

    Args:
        shown: a `store.Shown`.
        cache: renders the texts.
    """
    task = shown.task
    prompt = [_show_message(message, cache) for message in _messages(task.prompt, role="user")]
    completions = [_show_completion(task.completions[index], cache) for index in shown.order]
    return {
        "id": task.id,
        "kind": task.kind,
        "n": len(completions),
        "prompt": prompt,
        "completions": completions,
        "category": task.category,
        "expires": shown.expires,
    }


def _show_message(message: dict, cache: RenderCache) -> dict:
    text = _encodable(str(message.get("content") or ""))
    return {"role": _encodable(str(message.get("role") or "")), "html": cache.render(text), "text": text}


def _show_completion(completion, cache: RenderCache) -> dict:
    messages = [_show_message(message, cache) for message in _messages(completion, role="assistant")]
    if len(messages) == 1:
        return {"html": messages[0]["html"], "text": messages[0]["text"]}

    # A completion of several turns (tool calls): each turn has its role above it.
    parts = []
    for message in messages:
        parts.append(f"<p><strong>{html.escape(message['role'])}</strong></p>{message['html']}")
    return {"html": "".join(parts), "text": "\n\n".join(message["text"] for message in messages)}


def _messages(text_or_messages, *, role: str) -> list[dict]:
    if isinstance(text_or_messages, str):
        return [{"role": role, "content": text_or_messages}]
    return text_or_messages
