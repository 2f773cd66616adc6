// The page of the admin: how far judging has come, how well people agree, and who they are.

import { get, openSession, post, Refused } from "./api.js";
import { byId, duration, hidden, make, wireDialogs } from "./dom.js";

const REFRESH_MS = 10_000;
const DASH = "–";

let isPaused = false;
let hasMissedRefresh = false;
let ownName = ""; // an admin cannot end their own access

// ---- Numbers as text

function percent(share) {
  return share === null || share === undefined ? DASH : `${Math.round(share * 100)}%`;
}

function decimal(value) {
  return value === null || value === undefined ? DASH : value.toFixed(2).replace("-", "−");
}

function whole(value) {
  return value === null || value === undefined ? DASH : value.toLocaleString("en-US");
}

// ---- What is shown

function showFigures(id, figures) {
  const items = figures.map(([name, value]) =>
    make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
  );
  byId(id).replaceChildren(...items);
}

const PEOPLE_COLUMNS = [
  ["Judged", (person) => whole(person.judged)],
  ["Skipped", (person) => whole(person.skipped)],
  ["Median time", (person) => duration(person.median_seconds)],
  ["Agreement", (person) => percent(person.agreement)],
  ["Gold", (person) => percent(person.gold_accuracy)],
  ["Takes the first", (person) => percent(person.first_share)],
  ["Takes the longer", (person) => percent(person.longer_share)],
  ["Ties", (person) => percent(person.ties_share)],
];

function headCell(name) {
  return make("th", { role: "columnheader", scope: "col", text: name });
}

/** A cell; on a phone its name stands beside it, as rows are cards there. */
function cell(name, value) {
  return make("td", { role: "cell", "data-name": name }, make("span", { text: value }));
}

function showPeople(people, statistics) {
  const known = new Map(statistics.map((person) => [person.name, person]));
  const rows = people.map((person) => personRow(person, { ...person, ...known.get(person.name) }));
  byId("people-head").replaceChildren(...["Name", ...PEOPLE_COLUMNS.map(([name]) => name), "Access"].map(headCell));
  keepingFocus(() => byId("people-rows").replaceChildren(...rows));
  byId("people").hidden = people.length === 0;
  byId("nobody").hidden = people.length > 1; // the admin is the first
}

function personRow(person, numbers) {
  const reasons = numbers.outlier ?? [];
  const name = make("th", { role: "rowheader", scope: "row" }, make("span", { class: "person", text: person.name }));
  if (person.role === "admin") {
    name.append(make("span", { class: "tag", text: "admin" }));
  }
  if (!person.active) {
    name.append(make("span", { class: "tag off", text: "no access" }));
  }
  if (reasons.length > 0) {
    const items = reasons.map((reason) => make("li", { text: reason }));
    name.append(make("ul", { class: "reasons", "aria-label": `What stands out about ${person.name}` }, ...items));
  }
  const cells = PEOPLE_COLUMNS.map(([column, value]) => cell(column, value(numbers)));
  const row = make("tr", { role: "row", class: person.active ? null : "inactive" }, name, ...cells);
  row.append(make("td", { role: "cell", class: "access" }, ...personButtons(person)));
  return row;
}

function personButtons(person) {
  const link = make("button", { type: "button", id: `link-${person.id}` }, "New link", hidden(` of ${person.name}`));
  link.addEventListener("click", () => askForNewLink(person));
  if (person.name === ownName) {
    return [link];
  }
  const words = person.active ? "Deactivate" : "Activate";
  const change = make("button", { type: "button", id: `active-${person.id}` }, words, hidden(` ${person.name}`));
  change.addEventListener("click", () => setActive(person, !person.active));
  return [link, change];
}

/** Rows are made anew on every refresh: the button that had the focus gets it back. */
function keepingFocus(change) {
  const focused = document.activeElement?.id;
  change();
  if (focused && document.activeElement === document.body) {
    document.getElementById(focused)?.focus({ preventScroll: true });
  }
}

const CATEGORY_NAMES = {
  judgments: "Judgments",
  tasks: "Tasks",
  complete: "Complete",
  alpha: "α",
  kappa: "κ",
  agreement: "Agreement",
};

function showCategories(categories) {
  const entries = Object.entries(categories ?? {});
  byId("categories").hidden = entries.length === 0;
  if (entries.length === 0) {
    return;
  }
  const columns = Object.keys(CATEGORY_NAMES).filter((column) => entries.some(([, numbers]) => column in numbers));
  const rows = entries.map(([name, numbers]) => {
    const cells = columns.map((column) => cell(CATEGORY_NAMES[column], categoryValue(column, numbers[column])));
    return make("tr", { role: "row" }, make("th", { role: "rowheader", scope: "row", text: name || "none" }), ...cells);
  });
  const names = columns.map((column) => CATEGORY_NAMES[column]);
  byId("categories-head").replaceChildren(...["Category", ...names].map(headCell));
  byId("categories-rows").replaceChildren(...rows);
}

function categoryValue(column, value) {
  if (column === "agreement") {
    return percent(value);
  }
  return column === "alpha" || column === "kappa" ? decimal(value) : whole(value);
}

function showPaused(paused) {
  isPaused = paused;
  byId("paused").textContent = paused ? "Paused" : "Running";
  byId("paused").classList.toggle("off", paused);
  byId("pause").textContent = paused ? "Resume judging" : "Pause judging";
}

function show(statistics, people) {
  const { counts } = statistics;
  byId("progress").max = Math.max(counts.wanted, 1);
  byId("progress").value = Math.min(counts.judgments, counts.wanted);
  showFigures("counts", [
    ["Tasks complete", `${whole(counts.complete)} of ${whole(counts.tasks)}`],
    ["Judgments", `${whole(counts.judgments)} of ${whole(counts.wanted)}`],
    ["Median time", duration(statistics.median_seconds)],
    ["Gold accuracy", percent(statistics.gold_accuracy)],
  ]);
  showFigures("agreement", [
    ["Krippendorff’s α", decimal(statistics.alpha)],
    ["Cohen’s κ", decimal(statistics.kappa)],
    ["Plain agreement", percent(statistics.agreement)],
  ]);
  showPaused(statistics.paused ?? isPaused);
  showPeople(people, statistics.per_annotator);
  showCategories(statistics.by_category);
  byId("messages").replaceChildren(...(statistics.notices ?? []).map((line) => make("p", { text: line })));
  byId("messages").hidden = byId("messages").childElementCount === 0;
}

// ---- What the admin does

function say(text) {
  byId("status").textContent = text;
}

function fail(error) {
  const isSignedOut = error instanceof Refused && error.status === 401;
  const text = error instanceof Refused ? error.message : "The server does not answer. This page tries again.";
  byId("notice").textContent = isSignedOut ? "You are signed out: open your personal link again." : text;
  byId("notice").hidden = false;
}

/** Runs something that asks the server. What goes wrong is said at the top, until the admin does something else. */
async function attempt(action) {
  try {
    await action();
    byId("notice").hidden = true;
  } catch (error) {
    hasMissedRefresh = false;
    fail(error);
  }
}

async function refresh() {
  const [statistics, people] = await Promise.all([get("/api/admin/statistics"), get("/api/admin/annotators")]);
  show(statistics, people.annotators);
  byId("main").removeAttribute("aria-busy");
}

/** Refreshes the numbers again and again. This takes back only its own complaint, not that of a button. */
async function keepFresh() {
  if (document.visibilityState === "visible") {
    try {
      await refresh();
      byId("notice").hidden = byId("notice").hidden || hasMissedRefresh;
      hasMissedRefresh = false;
    } catch (error) {
      hasMissedRefresh = true;
      fail(error);
    }
  }
  setTimeout(keepFresh, REFRESH_MS);
}

function showLink(name, link) {
  const advice = "It is shown only now: copy it and send it to them, and to nobody else.";
  byId("link-text").textContent = `This link signs ${name} in. ${advice}`;
  byId("link-url").value = new URL(link, location.href).href;
  byId("copied").textContent = "";
  byId("link").showModal();
  byId("copy").focus();
}

async function copyLink() {
  const field = byId("link-url");
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    byId("copied").textContent = "Copied";
  } catch {
    byId("copied").textContent = "Press Ctrl+C to copy the marked link."; // no clipboard without https
    field.focus();
  }
}

function addPerson(event) {
  event.preventDefault();
  const name = byId("name").value.trim();
  return attempt(async () => {
    const reply = await post("/api/admin/annotators", { name });
    byId("name").value = "";
    showLink(name, reply.link);
    say(`${name} was added.`);
    await refresh();
  });
}

function askForNewLink(person) {
  byId("confirm-name").textContent = `New link for ${person.name}?`;
  byId("confirm-text").textContent = "The old link stops working, and where it was opened, the person is signed out.";
  byId("confirm-yes").textContent = "Make a new link";
  byId("confirm-yes").onclick = () => {
    byId("confirm").close();
    attempt(async () => {
      const reply = await post(`/api/admin/annotators/${person.id}/link`, {});
      showLink(person.name, reply.link);
    });
  };
  byId("confirm").showModal();
}

function setActive(person, active) {
  return attempt(async () => {
    await post(`/api/admin/annotators/${person.id}/active`, { active });
    say(active ? `${person.name} can judge again.` : `${person.name} has no access any more. Their judgments stay.`);
    await refresh();
  });
}

function changePause() {
  return attempt(async () => {
    const reply = await post("/api/admin/pause", { paused: !isPaused });
    showPaused(reply.paused ?? !isPaused);
    say(isPaused ? "Paused: nobody gets a new task." : "Resumed.");
  });
}

function counted(counts, what) {
  return Object.entries(counts).map(([reason, number]) => `${whole(number)} ${what} (${reason})`);
}

/** Says what is in the file that is being downloaded, and what is not. */
function showExportCounts(name) {
  return attempt(async () => {
    const counts = await get("/api/admin/export/counts");
    const number = whole(counts[name]);
    if (name === "demonstrations") {
      byId("exported").textContent = `${number} written or rated answers.`;
      return;
    }
    const rest = [...counted(counts.left_out, "left out"), ...counted(counts.notes, "with a note")];
    byId("exported").textContent = `${[`${number} of ${whole(counts.tasks)} tasks`, ...rest].join(", ")}.`;
  });
}

async function start() {
  wireDialogs();
  byId("add").addEventListener("submit", addPerson);
  byId("pause").addEventListener("click", changePause);
  byId("copy").addEventListener("click", copyLink);
  for (const name of ["comparisons", "demonstrations"]) {
    byId(`export-${name}`).addEventListener("click", () => showExportCounts(name));
  }
  await attempt(async () => {
    const session = await openSession();
    ownName = session.name;
    document.title = `Admin · ${session.title || "Judging answers"}`;
    byId("title").replaceChildren("Admin ", make("span", { class: "name", text: session.title }));
  });
  await keepFresh();
}

start();
