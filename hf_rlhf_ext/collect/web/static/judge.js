// The page on which a person judges: shows one task after the other and sends what the person chose.

import { get, openSession, OtherPerson, Refused, Unreachable } from "./api.js";
import { Clock } from "./clock.js";
import { byId, duration, make, markScrollers, setHtml, wireDialogs } from "./dom.js";
import { dropDraft, dropOldDrafts, keepDraft, readDraft } from "./drafts.js";
import { TaskForm } from "./form.js";
import { listenToKeys } from "./keys.js";
import { newKey, Outbox } from "./outbox.js";
import { StepScrolling } from "./scrolling.js";
import { readStored, writeStored } from "./storage.js";

const DOUBLE_PRESS_MS = 300; // a key that comes sooner after a new task was meant for the one before
const JUDGE = "/api/judgments";
const UNDO = "/api/undo";
const POLL_MS = 15_000; // how often a page without a task looks for one
const MESSAGES = {
  saved: "Saved",
  saving: "Saving…",
  skipped: "Skipped",
  retrying: "Not saved yet, trying again",
};

class Page {
  constructor() {
    this.session = null;
    this.outbox = null;
    this.form = null;
    this.isBusy = false; // a click is on its way: no other one counts
    this.isOver = false; // the session has ended: nothing counts until the link is opened again
    this.takesKeys = true; // false for a moment after a new task came
    this.keysTimer = null;
    this.clock = new Clock();
    this.scrolling = new StepScrolling(readChoice("in-step", true));
    this.poll = null;
    this.wire();
  }

  // ---- Start

  async start() {
    this.say("Loading…");
    this.session = await this.untilReached(openSession);
    this.outbox = new Outbox(this.session.name, (what) => this.reportSending(what));
    this.showSession();
    dropOldDrafts();
    this.say("");
    const [reply, answer] = await this.sendWaiting();
    this.show(reply ?? (await this.untilReached(() => this.getTask())), answer);
    this.openInstructionsOnce();
  }

  /** Repeats a GET until the server answers. */
  async untilReached(request) {
    for (let wait = 500; ; wait = Math.min(wait * 2, POLL_MS)) {
      try {
        return await request();
      } catch (error) {
        if (!(error instanceof Unreachable) && !(error instanceof Refused && error.mayPass)) {
          throw error;
        }
        this.say("The server does not answer, trying again", "bad");
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
  }

  /** The task of this person. */
  async getTask() {
    const reply = await get("/api/task");
    if (reply.name !== this.session.name) {
      throw new OtherPerson(reply.name);
    }
    return reply;
  }

  /** Sends what was clicked before a reload and not confirmed. Returns what to show then, with its answer, or nulls. */
  async sendWaiting() {
    let next = [null, null];
    for (const entry of this.outbox.waiting()) {
      try {
        const reply = await this.outbox.deliver(entry);
        if (entry.path === UNDO) {
          next = [reply.task, reply.answer];
        } else {
          dropDraft(this.session.name, entry.body.task);
          next = [reply.next, null];
          this.say(MESSAGES.saved, "good");
        }
      } catch (error) {
        if (!(error instanceof Refused) || error.status === 401) {
          throw error;
        }
        const text = `A judgment from before could not be saved: ${error.message}`;
        this.warn(text);
        this.showUnsaved(text, entry.body);
      }
    }
    return next;
  }

  showSession() {
    const { title, name, role, instructions_html: instructions } = this.session;
    document.title = title || document.title;
    byId("title").replaceChildren(`${title || "Judging answers"} `, make("span", { class: "name", text: name }));
    byId("to-admin").hidden = role !== "admin";
    byId("open-instructions").hidden = !instructions;
    setHtml(byId("instructions-text"), instructions ?? "");
    const others = this.outbox.othersWaiting();
    if (others.length > 0) {
      this.warn(`A judgment of ${others.join(", ")} waits in this browser: it is sent when their link is opened here.`);
    }
  }

  openInstructions() {
    byId("instructions").showModal();
    markScrollers(byId("instructions"));
  }

  /** Instructions open by themselves once for every version of them. */
  openInstructionsOnce() {
    const instructions = this.session.instructions_html;
    if (instructions && readStored("instructions") !== instructions) {
      this.openInstructions();
    }
    writeStored("instructions", instructions);
  }

  // ---- What is shown

  /** Shows what the server gave: a task, or why there is none. */
  show(reply, answer = null) {
    clearTimeout(this.poll);
    this.showProgress(reply.progress);
    byId("task").hidden = reply.task === null;
    byId("other").hidden = reply.task !== null;
    if (reply.task === null) {
      this.showNoTask(reply);
    } else {
      this.showTask(reply.task, answer);
    }
  }

  showTask(task, answer) {
    this.form = new TaskForm(task, this.session, (value) => this.pick(value), () => this.keepDraft());
    const form = this.form;
    byId("heading").textContent = form.heading;
    byId("heading").classList.toggle("for-readers", form.heading === this.session.title); // not twice in sight
    const messages = form.promptMessages();
    form.showPlain(byId("plain").checked);
    byId("prompt").replaceChildren(...messages);
    byId("answers").replaceChildren(...form.cards);
    byId("answers").dataset.count = String(form.cards.length);
    byId("more").replaceChildren(form.more);
    byId("board").replaceChildren(...(form.ranking === null ? [] : [form.ranking.element]));
    byId("scale").replaceChildren(...(form.scale === null ? [] : [form.scale.element]));
    byId("at-once-switch").hidden = form.scale === null;
    byId("in-step-switch").hidden = form.cards.length < 2;
    this.scrolling.watch(form.panes);
    const draft = answer === null ? readDraft(this.session.name, task.id, form.about) : { answer, seconds: 0 };
    if (draft !== null) {
      form.fill(draft.answer);
    }
    this.clock.start(draft?.seconds ?? 0);
    this.takeKeysSoon();
    byId("content").scrollTop = 0;
    window.scrollTo(0, 0);
    // Of a conversation, the last message is what the answers reply to.
    byId("prompt").scrollTop = messages.at(-1).offsetTop - messages[0].offsetTop;
    markScrollers(byId("task"));
    byId("main").dataset.task = task.id;
    byId("main").dataset.kind = task.kind;
    byId("main").dataset.state = "task";
    byId("heading").focus({ preventScroll: true });
  }

  showNoTask(reply) {
    const left = reply.progress && reply.progress.done < reply.progress.tasks;
    if (reply.paused) {
      const text = "Judging is paused at the moment. This page goes on by itself when it is resumed.";
      this.showCard("paused", "Paused", text);
    } else if (left) {
      const text = "Others are working on what is left. If something comes back, it appears here.";
      this.showCard("done", "Nothing for you right now", text);
    } else {
      const text = "Everything has been judged. Thank you! If new tasks are added, they appear here.";
      this.showCard("done", "All done", text);
    }
    this.poll = setTimeout(() => this.lookAgain(), POLL_MS);
  }

  showCard(state, heading, text) {
    this.form = null;
    this.clock.stop();
    byId("task").hidden = true;
    byId("other").hidden = false;
    byId("main").dataset.state = state;
    delete byId("main").dataset.task;
    const isNew = byId("other-heading").textContent !== heading;
    byId("other-heading").textContent = heading;
    byId("other-text").textContent = text;
    byId("other-undo").hidden = this.isOver;
    byId("other-again").hidden = this.isOver;
    if (isNew || document.activeElement === document.body) {
      byId("other-heading").focus();
    }
  }

  showProgress(progress) {
    if (!progress) {
      return;
    }
    const finished = progress.judged + progress.skipped;
    byId("progress").max = Math.max(finished + progress.open, 1);
    byId("progress").value = finished;
    const pace = progress.median_seconds === null ? "" : ` · ${duration(progress.median_seconds)} each`;
    byId("pace").textContent = `${progress.judged} judged · ${progress.open} left${pace}`;
  }

  async lookAgain() {
    if (this.isBusy || this.isOver) {
      return;
    }
    clearTimeout(this.poll);
    try {
      const reply = await this.getTask();
      this.say(reply.task === null ? "Looked again: nothing yet." : "");
      this.show(reply);
    } catch (error) {
      this.fail(error);
      if (error instanceof Unreachable || error.mayPass) {
        this.poll = setTimeout(() => this.lookAgain(), POLL_MS);
      }
    }
  }

  takeKeysSoon() {
    clearTimeout(this.keysTimer);
    this.takesKeys = false;
    byId("main").dataset.takesKeys = "false";
    this.keysTimer = setTimeout(() => {
      this.takesKeys = true;
      byId("main").dataset.takesKeys = "true";
    }, DOUBLE_PRESS_MS);
  }

  // ---- What the person does

  /** True if a click or a key counts now; otherwise says why not. */
  isReady() {
    if (this.isOver) {
      return false; // the page says so in large letters
    }
    if (this.isBusy) {
      this.say("Wait until the last judgment is saved.", "warm");
      return false;
    }
    if (!this.takesKeys) {
      this.say("That was meant for the task before? Press again.", "warm");
      return false;
    }
    return true;
  }

  /** A value of the scale was pressed or clicked. */
  pick(value) {
    if (!this.isReady()) {
      return;
    }
    this.form.scale.value = value;
    this.keepDraft();
    if (byId("at-once").checked) {
      this.save();
    }
  }

  save() {
    if (this.form === null || !this.isReady()) {
      return;
    }
    if (this.form.missing !== null) {
      const [message, lead] = this.form.missing;
      this.say(message, "warm");
      lead();
      return;
    }
    this.judge(this.form.read(), MESSAGES.saved);
  }

  skip() {
    if (this.form !== null && this.isReady()) {
      this.judge(this.form.read(true), MESSAGES.skipped);
    }
  }

  async judge(answer, done) {
    const task = this.form.task.id;
    const body = { task, key: newKey(), seconds: this.clock.seconds(), answer };
    await this.deliver(JUDGE, body, (reply) => {
      dropDraft(this.session.name, task);
      this.say(done, "good");
      this.show(reply.next);
    });
  }

  async undo() {
    if (!this.isReady()) {
      return;
    }
    await this.deliver(UNDO, { key: newKey() }, (reply) => {
      if (!reply.undone) {
        this.say("There is nothing to undo.", "warm");
        return;
      }
      this.say("Undone: change your judgment and save it again.", "good");
      this.show(reply.task, reply.answer);
    });
  }

  /** Sends a click and hands the reply on. What cannot be saved is said, and what was entered stays. */
  async deliver(path, body, accept) {
    const focused = document.activeElement;
    this.setBusy(true);
    try {
      const reply = await this.outbox.deliver(this.outbox.add(path, body));
      this.setBusy(false);
      accept(reply);
    } catch (error) {
      this.setBusy(false);
      focused?.focus({ preventScroll: true });
      await this.refused(error, body);
    } finally {
      byId("main").removeAttribute("aria-busy"); // now that what follows is shown
    }
  }

  /** While a judgment is on its way, nothing can be added to it: it would be lost. */
  setBusy(isBusy) {
    this.isBusy = isBusy;
    if (isBusy) {
      byId("main").setAttribute("aria-busy", "true");
    }
    for (const id of ["content", "board", "scale"]) {
      byId(id).inert = isBusy;
    }
  }

  async refused(error, body) {
    this.fail(error);
    if (error instanceof Refused && error.status === 409) {
      this.showUnsaved(`Your judgment was not saved: ${error.message}`, body);
      dropDraft(this.session.name, body.task);
      try {
        this.show(await this.getTask());
      } catch (next) {
        this.fail(next);
      }
    }
  }

  /** Hands back what the person had written in a judgment that the server will never take. */
  showUnsaved(reason, body) {
    const words = [body.answer?.comment, body.answer?.edited?.text].filter(Boolean);
    if (words.length > 0) {
      byId("unsaved-text").textContent = `${reason}. This is what you had written: copy it if you still need it.`;
      byId("unsaved-words").value = words.join("\n\n");
      byId("unsaved").showModal();
    }
  }

  /** Writes down what has been entered so far. Returns whether the browser keeps it. */
  keepDraft() {
    if (this.form === null || this.isBusy) {
      return true;
    }
    const draft = { answer: this.form.draft(), seconds: this.clock.seconds() };
    return keepDraft(this.session.name, this.form.task.id, this.form.about, draft);
  }

  // ---- Keys

  isOpenDialog() {
    return document.querySelector("dialog[open]") !== null;
  }

  digit(value) {
    if (this.form === null) {
      return;
    }
    const { ranking } = this.form;
    const most = ranking === null ? 7 : ranking.letters.length;
    const isRemoval = value === 0 && ranking !== null;
    if (!isRemoval && (value < 1 || value > most)) {
      this.say(`Choose 1 to ${most}.`, "warm");
    } else if (ranking === null) {
      this.pick(value);
    } else if (this.isReady()) {
      this.form.rankCurrent(isRemoval ? null : value);
    }
  }

  move(step) {
    this.form?.move(step);
  }

  leaveField() {
    byId("heading").focus({ preventScroll: true });
  }

  isLetter(key) {
    return key in LETTER_KEYS && this.session !== null;
  }

  letter(key) {
    LETTER_KEYS[key](this);
  }

  toggleFlag(flag) {
    if (this.form === null || !this.isReady()) {
      return;
    }
    if (this.form.current === null) {
      this.say("Choose the answer first: ← or →.", "warm");
      return;
    }
    const isOn = this.form.toggleFlag(flag);
    const letter = this.form.letters[this.form.current];
    this.say(`Answer ${letter}: ${flag.replace("_", " ")} ${isOn ? "marked" : "not marked"}`);
  }

  edit() {
    if (this.form === null || !this.isReady()) {
      return;
    }
    if (this.form.current === null) {
      this.say("Choose the answer first: ← or →.", "warm");
    } else if (!this.form.edit(this.form.current)) {
      this.say("You have already written an answer: empty the field to start from another one.", "warm");
    }
  }

  focusField(name) {
    if (this.form !== null && this.isReady()) {
      this.form.more.open = true;
      this.form[name].focus();
    }
  }

  toggleSwitch(id) {
    byId(id).click();
  }

  // ---- Messages

  say(text, kind = "") {
    const status = byId("status");
    if (status.textContent !== text) {
      status.textContent = text; // the same text again would be read out again
    }
    status.className = kind;
    byId("try-now").hidden = true;
  }

  warn(text, isBad = true) {
    const notice = byId("notice");
    notice.textContent = text;
    notice.classList.toggle("bad", isBad);
    notice.hidden = text === "";
  }

  reportSending(what) {
    if (what === "retrying") {
      this.say(MESSAGES.retrying, "bad");
      byId("try-now").hidden = false;
    } else {
      this.say(MESSAGES.saving);
    }
  }

  fail(error) {
    if (error instanceof OtherPerson) {
      this.endSession("Someone else is signed in", `This browser is now signed in as ${error.message}.`);
    } else if (error instanceof Refused && error.status === 401) {
      this.endSession("You are signed out", "Your link may have been replaced by a new one.");
    } else if (error instanceof Unreachable) {
      this.say("The server does not answer.", "bad");
    } else {
      this.say(`Not saved: ${error.message}`, "bad");
    }
  }

  /** Ends the work of this person on this page. What was entered stays: in the browser, or else on the page. */
  endSession(heading, text) {
    const isKept = this.keepDraft() && (this.outbox?.isKept ?? true);
    if (!isKept) {
      const advice = "This browser keeps nothing: leave this page open, open your link in another tab, and save again.";
      this.warn(`${heading}. ${text} ${advice}`);
      this.say("Not saved.", "bad");
      return;
    }
    const advice = "Open your personal link in this browser: anything that you had entered is kept here until then.";
    this.isOver = true;
    clearTimeout(this.poll);
    this.showCard("signed-out", heading, `${text} ${advice}`);
    this.say("");
  }

  // ---- Wiring

  wire() {
    wireDialogs();
    listenToKeys(this);
    for (const [id, isOn] of [["at-once", true], ["in-step", true], ["plain", false]]) {
      byId(id).checked = readChoice(id, isOn);
      byId(id).addEventListener("change", () => writeStored(id, byId(id).checked));
    }
    byId("plain").addEventListener("change", () => {
      this.form?.showPlain(byId("plain").checked);
      markScrollers(byId("task"));
    });
    byId("in-step").addEventListener("change", () => {
      this.scrolling.isOn = byId("in-step").checked;
    });
    byId("verdict").addEventListener("submit", (event) => {
      event.preventDefault();
      this.save();
    });
    for (const [id, action] of [
      ["skip", () => this.skip()],
      ["undo", () => this.undo()],
      ["other-undo", () => this.undo()],
      ["other-again", () => this.lookAgain()],
      ["try-now", () => this.outbox.tryNow()],
      ["open-help", () => byId("help").showModal()],
      ["open-instructions", () => this.openInstructions()],
    ]) {
      byId(id).addEventListener("click", action);
    }
    this.wireWindow();
  }

  wireWindow() {
    const followNetwork = () => {
      const text = "You are offline. You can judge this task: it is kept here and saved when the connection is back.";
      this.warn(navigator.onLine ? "" : text, false);
    };
    window.addEventListener("offline", followNetwork);
    window.addEventListener("online", followNetwork);
    window.addEventListener("pagehide", () => this.keepDraft());
    window.addEventListener("resize", () => markScrollers(document));
    window.addEventListener("beforeunload", (event) => {
      if (this.isBusy && !this.outbox.isKept) {
        event.preventDefault(); // this browser keeps nothing, so leaving would lose the judgment
      }
    });
  }
}

const LETTER_KEYS = {
  s: (page) => page.skip(),
  u: (page) => page.undo(),
  i: (page) => page.session.instructions_html && page.openInstructions(),
  "?": () => byId("help").showModal(),
  h: (page) => page.toggleFlag("harmful"),
  n: (page) => page.toggleFlag("nonsense"),
  w: (page) => page.toggleFlag("wrong_language"),
  e: (page) => page.edit(),
  b: (page) => page.focusField("edited"),
  c: (page) => page.focusField("comment"),
  g: (page) => page.focusField("category"),
  a: (page) => page.toggleSwitch("at-once"),
  k: (page) => page.toggleSwitch("in-step"),
  p: (page) => page.toggleSwitch("plain"),
};

function readChoice(name, otherwise) {
  return readStored(name) ?? otherwise;
}

const page = new Page();
page.start().catch((error) => page.fail(error));
