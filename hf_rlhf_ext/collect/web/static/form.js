// The form of one task: prompt, answers, and what a person says about them. It knows nothing of the network.

import { hidden, make, setHtml } from "./dom.js";
import { Ranking } from "./ranking.js";
import { Scale } from "./scale.js";

export const MOST_COMMENT = 2000;
export const MOST_EDITED = 20_000;

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const ROLE_NAMES = { user: "User", assistant: "Assistant", system: "System", tool: "Tool" };
const FLAG_NAMES = { harmful: "Harmful", nonsense: "Nonsense", wrong_language: "Wrong language" };
const FLAG_KEYS = { harmful: "h", nonsense: "n", wrong_language: "w" };
const HEADINGS = {
  compare: "Which answer is better?",
  rank: "Rank the answers, best first",
  rate: "How good is this answer?",
};

/** The words of HTML without their markup. A parsed document loads and runs nothing. */
function plainText(html) {
  const text = new DOMParser().parseFromString(html, "text/html").body.textContent;
  return text.replace(/\s+/g, " ").trim();
}

function field(label, id, ...controls) {
  return make("div", { class: "field" }, make("label", { for: id, text: label }), ...controls);
}

export class TaskForm {
  /**
   * @param task as the server gives it
   * @param session names of flags and categories
   * @param onPick called with a value that was clicked on the scale
   * @param onChange called after every change by the person
   */
  constructor(task, session, onPick, onChange) {
    this.task = task;
    this.session = session;
    this.onChange = onChange;
    this.current = task.kind === "rate" ? 0 : null; // the answer that keys for flags and places mean
    this.letters = task.completions.map((_, index) => LETTERS[index] ?? String(index + 1));
    this.texts = task.completions.map((completion) => completion.text ?? "");
    this.shown = []; // each text of the task: its element, and the text with and without markup
    this.scale = null;
    this.ranking = null;
    this.makeVerdict(onPick);
    this.cards = task.completions.map((completion, index) => this.makeCard(completion, index));
    this.panes = this.cards.map((card) => card.querySelector(".pane"));
    this.makeMore();
  }

  get heading() {
    return HEADINGS[this.task.kind];
  }

  makeVerdict(onPick) {
    if (this.task.kind === "rank") {
      const words = this.task.completions.map((completion) => plainText(completion.html));
      this.ranking = new Ranking(this.letters, words, () => this.onChange());
    } else {
      this.scale = new Scale(this.task.kind, onPick);
      this.scale.element.addEventListener("change", () => this.onChange());
    }
  }

  /** The messages of the prompt; their roles are named where there is more than the user's. */
  promptMessages() {
    const isOneMessage = this.task.prompt.length === 1;
    return this.task.prompt.map((message) => {
      const prose = make("div", { class: "prose", dir: "auto" });
      this.addText(prose, message);
      const item = make("div", { class: `message ${message.role === "assistant" ? "assistant" : ""}` });
      if (!isOneMessage || message.role !== "user") {
        item.append(make("p", { class: "role", text: ROLE_NAMES[message.role] ?? message.role }));
      }
      item.append(prose);
      return item;
    });
  }

  addText(element, { html, text }) {
    this.shown.push({ element, html, text });
    setHtml(element, html);
  }

  /** Shows every text as it was written, or with its markup rendered. */
  showPlain(isPlain) {
    for (const { element, html, text } of this.shown) {
      if (isPlain) {
        element.replaceChildren(make("pre", { text }));
      } else {
        setHtml(element, html);
      }
    }
  }

  /** What tells this task from another one with the same number. */
  get about() {
    return this.texts.join("\n").slice(0, 300);
  }

  makeCard(completion, index) {
    const id = `answer-${index}`;
    const name = this.task.kind === "rate" ? "Answer" : `Answer ${this.letters[index]}`;
    const head = make("header", {}, make("h3", { id, text: name }));
    if (this.ranking !== null) {
      head.append(this.ranking.radios[index].group);
    }
    const pane = make("div", { class: "pane prose", tabindex: 0, dir: "auto", role: "group", "aria-labelledby": id });
    this.addText(pane, completion);
    const edit = make("button", { type: "button", class: "plain edit" }, "Edit", hidden(` ${name}`));
    edit.addEventListener("click", () => this.edit(index));
    const foot = make("footer", {}, this.makeFlags(name, index), edit);
    const card = make("article", { class: "answer", "aria-labelledby": id }, head, pane, foot);
    card.addEventListener("focusin", () => this.setCurrent(index));
    card.addEventListener("pointerdown", () => this.setCurrent(index));
    return card;
  }

  makeFlags(name, index) {
    const group = make("fieldset", { class: "flags" }, make("legend", {}, hidden(`${name} is`)));
    for (const flag of this.session.flags) {
      const words = FLAG_NAMES[flag] ?? flag;
      const box = make("input", { type: "checkbox", name: `flag-${index}`, value: flag, class: "for-readers" });
      box.addEventListener("change", () => this.onChange());
      const title = flag in FLAG_KEYS ? `Key: ${FLAG_KEYS[flag]}` : null;
      group.append(make("label", { class: "flag", title }, box, make("span", { text: words })));
    }
    return group;
  }

  makeMore() {
    this.comment = make("textarea", { id: "comment", rows: 3, dir: "auto", maxlength: MOST_COMMENT });
    this.category = this.makeCategory();
    this.editedFrom = this.makeEditedFrom();
    this.editedNote = make("p", { id: "edited-note", class: "hint" });
    this.edited = make("textarea", { id: "edited", rows: 8, dir: "auto", maxlength: MOST_EDITED });
    this.edited.setAttribute("aria-describedby", this.editedNote.id);
    this.ratings = this.task.kind === "rate" ? [] : this.letters.map((letter, index) => this.makeRating(letter, index));
    const comment = field("Comment", "comment", this.comment);
    const category = field("Category of the prompt", "category", this.category);
    const ratings = make("div", { class: "field ratings" }, ...this.ratings.map((rating) => rating.label));
    const stack = make("div", { class: "stack" }, category, ratings);
    const better = field("A better answer", "edited", this.editedFrom, this.edited, this.editedNote);
    better.classList.add("wide");
    const summary = make("summary", { text: "Comment, category, ratings, a better answer" });
    this.more = make("details", { class: "more" }, summary, make("div", { class: "fields" }, comment, stack, better));
    this.more.addEventListener("input", () => {
      this.describeEdited();
      this.onChange();
    });
    this.editedFrom.addEventListener("change", () => this.changeEditedFrom());
    this.describeEdited();
  }

  makeCategory() {
    const given = this.task.category;
    const names = this.session.categories ?? [];
    const asGiven = given ? `${given} (as given)` : "–";
    if (names.length === 0) {
      return make("input", { type: "text", id: "category", maxlength: 100, placeholder: asGiven });
    }
    const select = make("select", { id: "category" }, make("option", { value: "", text: asGiven }));
    for (const name of names) {
      if (name !== given) {
        select.append(make("option", { value: name, text: name }));
      }
    }
    return select;
  }

  makeEditedFrom() {
    const select = make("select", { id: "edited-from", "aria-label": "The better answer starts from" });
    select.append(make("option", { value: "", text: "Written from scratch" }));
    for (const [index, letter] of this.letters.entries()) {
      const name = this.task.kind === "rate" ? "the answer" : `answer ${letter}`;
      select.append(make("option", { value: index, text: `Starting from ${name}` }));
    }
    return select;
  }

  makeRating(letter, index) {
    const select = make("select", { id: `rating-${index}` }, make("option", { value: "", text: "–" }));
    const words = { 1: "1 · very bad", 4: "4 · middling", 7: "7 · excellent" };
    for (let value = 1; value <= 7; value += 1) {
      select.append(make("option", { value, text: words[value] ?? String(value) }));
    }
    return { select, label: make("label", {}, `Rating of answer ${letter}`, select) };
  }

  // ---- Which answer the keys mean

  setCurrent(index) {
    this.current = index;
    for (const [other, card] of this.cards.entries()) {
      card.classList.toggle("current", other === index && this.cards.length > 1);
    }
  }

  /** Moves the focus to another answer; from nothing, to the first or the last one. */
  move(step) {
    const last = this.cards.length - 1;
    const from = this.current ?? (step > 0 ? -1 : last + 1);
    this.focusAnswer(Math.min(Math.max(from + step, 0), last));
  }

  focusAnswer(index) {
    this.panes[index].focus({ preventScroll: true });
    this.cards[index].scrollIntoView({ block: "nearest" });
  }

  /** Gives the current answer a place, and goes on to the next one without. */
  rankCurrent(place) {
    this.ranking.put(this.current ?? 0, place);
    const missing = this.ranking.missing;
    if (place !== null && missing !== null) {
      this.focusAnswer(missing);
    }
  }

  toggleFlag(flag) {
    const box = this.cards[this.current].querySelector(`input[value="${flag}"]`);
    box.checked = !box.checked;
    this.onChange();
    return box.checked;
  }

  // ---- A better answer

  /** A field takes at most so many characters from the keyboard, but the answer that it starts from may be longer. */
  get isEditedTooLong() {
    return !this.isEditedUnchanged && this.edited.value.length > MOST_EDITED;
  }

  get isEditedUnchanged() {
    const from = this.editedFrom.value;
    return from !== "" && this.edited.value === this.texts[Number(from)];
  }

  /** Puts an answer into the editor, unless that would overwrite what the person wrote. Returns whether it did. */
  edit(index) {
    this.more.open = true;
    const isFree = this.edited.value.trim() === "" || this.isEditedUnchanged;
    if (isFree) {
      this.editedFrom.value = String(index);
      this.edited.value = this.texts[index];
    }
    this.describeEdited();
    this.edited.focus({ preventScroll: true });
    this.edited.setSelectionRange(0, 0);
    this.edited.scrollTop = 0;
    this.edited.scrollIntoView({ block: "center" });
    this.onChange();
    return isFree;
  }

  changeEditedFrom() {
    const wasOriginal = this.edited.value.trim() === "" || this.texts.includes(this.edited.value);
    if (wasOriginal) {
      const from = this.editedFrom.value;
      this.edited.value = from === "" ? "" : this.texts[Number(from)];
    }
    this.describeEdited();
    this.onChange();
  }

  describeEdited() {
    const length = this.edited.value.trim().length;
    if (length === 0) {
      this.editedNote.textContent = "Optional. It becomes an example of a good answer.";
    } else if (this.isEditedUnchanged) {
      this.editedNote.textContent = "Still the same as the answer: it is saved only if you change it.";
    } else {
      const count = this.edited.value.length.toLocaleString("en-US");
      const most = MOST_EDITED.toLocaleString("en-US");
      const what = this.isEditedTooLong ? "Shorten it to save it." : "It is saved with your judgment.";
      this.editedNote.textContent = `${count} of ${most} characters. ${what}`;
    }
  }

  // ---- The answer, in display positions

  /** What is missing before this can be saved, as [message, function that leads there]; null if nothing is. */
  get missing() {
    if (this.ranking !== null && this.ranking.missing !== null) {
      const index = this.ranking.missing;
      return [`Answer ${this.letters[index]} has no place yet.`, () => this.focusAnswer(index)];
    }
    if (this.scale !== null && this.scale.value === null) {
      return ["Choose 1 to 7 first.", () => {}];
    }
    if (this.isEditedTooLong) {
      return ["Your better answer is too long.", () => this.edited.focus()];
    }
    return null;
  }

  /** The answer to send: a skip, or what was chosen. */
  read(isSkip = false) {
    const answer = isSkip ? { skip: true } : this.readVerdict();
    const flags = this.cards.map((card) => {
      const checked = card.querySelectorAll(".flag input:checked");
      return Array.from(checked, (box) => box.value);
    });
    if (flags.some((names) => names.length > 0)) {
      answer.flags = flags;
    }
    const ratings = this.ratings.map((rating) => (rating.select.value === "" ? null : Number(rating.select.value)));
    if (ratings.some((rating) => rating !== null)) {
      answer.ratings = ratings;
    }
    for (const [name, field] of [["comment", this.comment], ["category", this.category]]) {
      if (field.value.trim() !== "") {
        answer[name] = field.value.trim();
      }
    }
    if (this.edited.value.trim() !== "" && !this.isEditedUnchanged) {
      const from = this.editedFrom.value;
      answer.edited = { position: from === "" ? null : Number(from), text: this.edited.value };
    }
    return answer;
  }

  readVerdict() {
    if (this.task.kind === "rank") {
      return { ranks: this.ranking.value };
    }
    return this.task.kind === "rate" ? { ratings: [this.scale.value] } : { preference: this.scale.value };
  }

  /** Shows an answer again: one that was taken back, or a draft. */
  fill(answer) {
    if (this.ranking !== null) {
      this.ranking.value = answer.ranks ?? answer.places ?? null;
    } else {
      this.scale.value = (this.task.kind === "rate" ? answer.ratings?.[0] : answer.preference) ?? null;
    }
    for (const [index, card] of this.cards.entries()) {
      for (const box of card.querySelectorAll(".flag input")) {
        box.checked = answer.flags?.[index]?.includes(box.value) ?? false;
      }
    }
    for (const [index, rating] of this.ratings.entries()) {
      rating.select.value = answer.ratings?.[index] ?? "";
    }
    this.comment.value = answer.comment ?? "";
    this.fillCategory(answer.category ?? "");
    this.editedFrom.value = answer.edited?.position ?? "";
    this.edited.value = answer.edited?.text ?? "";
    this.describeEdited();
    const hasMore = answer.comment || answer.category || answer.edited || (this.ratings.length > 0 && answer.ratings);
    this.more.open = Boolean(hasMore);
  }

  fillCategory(category) {
    this.category.value = category;
    if (this.category.value !== category) {
      this.category.append(make("option", { value: category, text: category })); // no longer in the list of categories
      this.category.value = category;
    }
  }

  /** What has been entered so far, complete or not. */
  draft() {
    const draft = this.read();
    if (this.ranking !== null) {
      draft.places = this.ranking.places;
    }
    return draft;
  }
}
