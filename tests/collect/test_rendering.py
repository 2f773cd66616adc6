import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.collect.web import rendering
from hf_rlhf_ext.collect.web.rendering import RenderCache, render_markdown, show_task

# Written by hand here, as a second opinion on the lists in rendering.py.
TAGS = {"p", "br", "hr", "strong", "em", "s", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "h3", "h4", "h5", "h6"}
ATTRIBUTES = {"a": {"href", "title", "rel", "target"}, "ol": {"start"}, "pre": {"tabindex"}}


class Page(HTMLParser):
    """What a browser would find: tags with attributes, and text."""

    def __init__(self, rendered):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.other = [], "", []
        self.feed(rendered)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.other.append(data)

    def handle_decl(self, decl):
        self.other.append(decl)

    def handle_pi(self, data):
        self.other.append(data)


def assert_harmless(rendered):
    page = Page(rendered)
    assert not page.other, rendered
    for tag, attributes in page.tags:
        assert tag in TAGS, rendered
        assert set(attributes) <= ATTRIBUTES.get(tag, set()), rendered
        if tag == "a":
            assert attributes["rel"] == "noopener noreferrer nofollow" and attributes["target"] == "_blank"
            if "href" in attributes:
                assert urlsplit(attributes["href"]).scheme in {"http", "https", "mailto"}, rendered
    return page


def names(rendered):
    return [tag for tag, _ in Page(rendered).tags]


# ---- what people see --------------------------------------------------------------------------------------------


def test_the_usual_markdown_becomes_html():
    text = "# Title\n\nSome *words* and **more**, ~~gone~~ and `code`.\n\n"
    text += "- one\n- two\n\n3. three\n\n> said\n\n```python\nx<1\n```"
    rendered = render_markdown(text)
    expected = "h3 p em strong s code ul li li ol li blockquote p pre code".split()
    assert names(rendered) == expected
    assert '<ol start="3">' in rendered
    assert '<pre tabindex="0"><code>x&lt;1\n</code></pre>' in rendered
    assert_harmless(rendered)


def test_a_table_becomes_a_table():
    rendered = render_markdown("| a | b |\n|---|---:|\n| 1 | 2 |")
    assert names(rendered) == "table thead tr th th tbody tr td td".split()


def test_line_breaks_stay():
    assert names(render_markdown("one\ntwo")) == ["p", "br"]


def test_headings_are_below_those_of_the_page():
    assert names(render_markdown("# a\n\n## b\n\n###### c")) == ["h3", "h4", "h6"]


def test_links_open_elsewhere_and_do_not_tell_where_from():
    rendered = render_markdown("[x](https://a.example/?b=1&c=2 'hm') <https://b.example> [m](mailto:a@b.example)")
    page = assert_harmless(rendered)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [
        "https://a.example/?b=1&c=2",
        "https://b.example",
        "mailto:a@b.example",
    ]


def test_an_image_becomes_a_link():
    rendered = render_markdown("![a cat](https://a.example/cat.png)")
    page = assert_harmless(rendered)
    assert "img" not in names(rendered) and "a cat" in page.text
    assert ("a", "https://a.example/cat.png") in [(tag, attributes.get("href")) for tag, attributes in page.tags]


# ---- attacks ----------------------------------------------------------------------------------------------------

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>*{display:none}</style>",
    "<base href=https://evil.example>",
    "<form action=https://evil.example><input name=a></form>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<!-- a --><![CDATA[<script>]]><?php x ?>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](java&Tab;script:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    "[x](//evil.example/a)",
    "[x](/api/undo)",
    "[x](file:///etc/passwd)",
    '[x](https://a.example/"onmouseover="alert(1))',
    "[x](https://a.example '\" onmouseover=alert(1) x=\"')",
    '```"><script>alert(1)</script>\ncode\n```',
    '``` x" onclick="alert(1)\ncode\n```',
    "`<script>alert(1)</script>`",
    "| <script> | [x](javascript:1) |\n|---|---|\n| <img onerror=1> | b |",
    "# <script>alert(1)</script>",
    "\ud800<script>\udfff",
    "\x00<scr\x00ipt>alert(1)</scr\x00ipt>",
    "\u202e<script>\u2028alert(1)",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_dangerous_gets_through(text):
    for wrapped in (text, f"a {text} b", f"- {text}", f"> {text}", f"**{text}**", f"[{text}](https://a.example)"):
        assert_harmless(render_markdown(wrapped))
        assert_harmless(RenderCache().render(wrapped))


def test_html_is_shown_as_it_was_written():
    assert Page(render_markdown("<script>alert(1)</script>")).text.strip() == "<script>alert(1)</script>"


MARKS = "< > & \" ' / \\ ` ``` ~~~ * ** _ ~~ [ ] ( ) ]( ![ | --- # > - 1. : ; = !"
MARKUP = "<!-- --> <a <script </script> &lt; &#x3c; javascript: data: onerror= href= https://a.example |---|---|"
pieces = st.sampled_from([*ATTACKS, *MARKS.split(), *MARKUP.split(), "\n", "\n\n", "    ", "\t", " "])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(pieces, st.text(max_size=6)), max_size=25).map("".join))
def test_any_text_becomes_harmless_html(text):
    assert_harmless(render_markdown(text))


# ---- nothing is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[note]: https://a.example 'titled'",
        "| a |\n|---|\n| b | beyond |",
        ">" * 200 + " deep",
        "- " * 200 + "deep",
        "[x](somewhere/else)",
        "<!-- hidden -->",
        "<details>closed</details>",
    ],
)
def test_text_that_markdown_would_hide_is_shown(text):
    rendered = render_markdown(text)
    page = assert_harmless(rendered)
    seen = page.text + str(page.tags)
    for word in "note titled beyond deep somewhere hidden closed".split():
        assert word in seen or word not in text


@pytest.mark.parametrize("text", ["#", "-", "```", ">", "1.", "[](https://a.example)", "![](https://a.example/b)"])
def test_a_text_of_signs_that_would_be_invisible_is_shown(text):
    assert Page(render_markdown(text)).text == text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            "> - 1. # | |---| [a]: [ ](b) ``` `x < <p> </p> <!-- ** _ ~~ &amp; &copy; %41 \n \n\n".split(" ") + ["    "]
        ),
        max_size=20,
    ).flatmap(lambda marks: st.permutations([*marks, " alpha ", " beta ", " gamma7 "]))
)
def test_every_word_of_any_text_is_shown(parts):
    page = Page(render_markdown("".join(parts)))
    seen = page.text + str(page.tags)
    for word in ("alpha", "beta", "gamma7"):
        assert word in seen or word in _languages("".join(parts))


def _languages(text):
    """The words that may be the language of a code block, which is not shown."""
    return re.findall(r"(?:```+|~~~+)\s*(\w+)", text)


def test_only_the_language_of_a_code_block_is_not_shown():
    assert Page(render_markdown("```python\nx\n```")).text.strip() == "x"
    assert "answer" in Page(render_markdown("```The answer is no\nx\n```")).text


def test_link_definitions_do_not_turn_markdown_off():
    rendered = render_markdown("[note]: https://a.example\n\n**b**")
    assert "strong" in names(rendered) and "note" in Page(rendered).text


# ---- bounded time -----------------------------------------------------------------------------------------------

N = 10_000
SLOW = {
    "quotes": ">" * N,
    "brackets": "[" * N,
    "links": "[a](" * N,
    "images": "![" * N,
    "pairs": "[" * N + "]" * N,
    "backticks": "".join("`" * (i % 50 + 1) + " " for i in range(N // 10)),
    "stars": "*a " * N,
    "mixed": "*_" * N,
    "tables": "|a" * 1_400 + "\n" + "|-" * 1_400 + "\n" + "|a\n" * 200,
    "a large table": "|a" * 90 + "\n" + "|-" * 90 + "\n" + "a\n" * 200,
    "lists": "- " * N,
    "angles": "<" * N,
    "definitions": "[a]: b\n" * N,
    "ampersands": "&" * N,
}


@pytest.mark.parametrize("name", SLOW)
def test_hostile_markdown_takes_bounded_time(name):
    started = time.perf_counter()
    rendered = render_markdown(SLOW[name])
    assert time.perf_counter() - started < 5  # on a busy machine; a quarter of a second on an idle one
    assert_harmless(rendered)


def test_a_text_of_two_megabytes_is_shown_plain_and_fast():
    text = "<script>alert(1)</script> [x](javascript:1) **b** " * 40_000
    assert len(text) == 2_000_000
    started = time.perf_counter()
    rendered = render_markdown(text)
    assert time.perf_counter() - started < 3
    assert rendered.startswith('<pre tabindex="0">') and "<script" not in rendered and rendered.count("<") == 2
    assert Page(rendered).text == text


# ---- tasks and cache --------------------------------------------------------------------------------------------


def shown(prompt, completions, order, **others):
    task = SimpleNamespace(id=7, kind="compare", prompt=prompt, completions=completions, category=None, **others)
    return SimpleNamespace(task=task, order=order, expires=12.0, answer=None)


def test_a_task_is_shown_in_display_order_and_blinded():
    secret = {
        "made_by": [{"policy": "ppo"}, {"policy": "sft"}],
        "gold": {"best": [1]},
        "source": "hidden",
        "batch": "b",
    }
    page = show_task(shown("why?", ["first", "second"], [1, 0], **secret), RenderCache())
    assert [completion["text"] for completion in page["completions"]] == ["second", "first"]
    assert page["prompt"] == [{"role": "user", "html": "<p>why?</p>\n", "text": "why?"}]
    assert set(page) == {"id", "kind", "n", "prompt", "completions", "category", "expires"}
    assert all(set(completion) == {"html", "text"} for completion in page["completions"])


def test_messages_keep_their_roles():
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "*hi*"}]
    turns = [{"role": "assistant<b>", "content": "one"}, {"role": "tool", "content": None}]
    page = show_task(shown(prompt, [[{"role": "assistant", "content": "yes"}], turns], [0, 1]), RenderCache())
    assert [message["role"] for message in page["prompt"]] == ["system", "user"]
    assert page["completions"][0] == {"html": "<p>yes</p>\n", "text": "yes"}
    assert page["completions"][1]["html"].startswith("<p><strong>assistant&lt;b&gt;</strong></p><p>one</p>")


def test_the_cache_renders_once_and_stays_small(monkeypatch):
    calls = []

    def render(text):
        calls.append(text)
        return "h" * len(text)

    monkeypatch.setattr(rendering, "render_markdown", render)
    cache = RenderCache(max_characters=100)
    for text in ("a" * 20, "b" * 20, "a" * 20, "c" * 20, "b" * 20, "d" * 80):
        cache.render(text)
    # Each text of 20 takes 40: two fit. "b" was the oldest when "c" came, and one of 160 never fits.
    assert [text[0] for text in calls] == ["a", "b", "c", "b", "d"]
    assert cache._characters <= 100
