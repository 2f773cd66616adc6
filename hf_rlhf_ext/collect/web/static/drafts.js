// What a person has begun to enter for a task. It outlasts a reload, a closed tab, and the end of the session: a new
// link is often opened in another tab.

import { dropStored, readStored, storedNames, writeStored } from "./storage.js";

const DRAFTS = "draft:";
const MOST_DRAFTS = 20; // the oldest are forgotten: their tasks went to others

function nameOf(person, taskId) {
  return `${DRAFTS}${person}:${taskId}`;
}

/**
 * Keeps a draft, and returns whether the browser does so.
 * @param about what the task shows: the number of a task means another one after the server's file was replaced
 * @param draft { answer, seconds }
 */
export function keepDraft(person, taskId, about, draft) {
  return writeStored(nameOf(person, taskId), { ...draft, about, when: Date.now() });
}

export function readDraft(person, taskId, about) {
  const draft = readStored(nameOf(person, taskId));
  return draft !== null && draft.about === about ? draft : null;
}

export function dropDraft(person, taskId) {
  dropStored(nameOf(person, taskId));
}

export function dropOldDrafts() {
  const drafts = storedNames(DRAFTS).map((name) => ({ name, when: readStored(name)?.when ?? 0 }));
  drafts.sort((one, other) => other.when - one.when);
  for (const { name } of drafts.slice(MOST_DRAFTS)) {
    dropStored(name);
  }
}
