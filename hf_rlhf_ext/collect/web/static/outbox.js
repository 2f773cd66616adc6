// What a person has clicked and the server has not confirmed yet. It is written down before it is sent, with its key,
// and sent again with the same key until the server answers: after a lost reply, and after a reload of the page.

import { openSession, post, Refused, Unreachable } from "./api.js";
import { readStored, writeStored } from "./storage.js";

const STORED = "outbox";
const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 15_000;

/** A key that no other click has. `randomUUID` exists only on https and on loopback. */
export function newKey() {
  if (crypto.randomUUID) {
    return crypto.randomUUID();
  }
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function readAll() {
  const entries = readStored(STORED);
  return Array.isArray(entries) ? entries : [];
}

export class Outbox {
  /**
   * @param person name of the person who is signed in
   * @param report called with "saving" and with "retrying"
   */
  constructor(person, report) {
    this.person = person;
    this.report = report;
    this.wake = () => {};
    this.isKept = true; // false: this browser keeps nothing, so a reload would lose what is on its way
    window.addEventListener("online", () => this.tryNow());
  }

  /** What this person has clicked and was not confirmed, oldest first. */
  waiting() {
    return readAll().filter((entry) => entry.person === this.person);
  }

  /** Names of other people whose clicks wait in this browser. */
  othersWaiting() {
    const names = readAll().map((entry) => entry.person);
    return [...new Set(names.filter((name) => name !== this.person))];
  }

  add(path, body) {
    const entry = { person: this.person, path, body };
    this.isKept = writeStored(STORED, [...readAll(), entry]);
    return entry;
  }

  remove(entry) {
    writeStored(STORED, readAll().filter((other) => other.body.key !== entry.body.key));
  }

  tryNow() {
    this.wake();
  }

  /**
   * Sends an entry until the server answers, and returns the reply. Throws `Refused` when the server will not take it
   * (the entry is dropped, except for a lost session) and `OtherPerson`.
   */
  async deliver(entry) {
    let wait = FIRST_WAIT_MS;
    this.report("saving");
    for (;;) {
      try {
        const reply = await this.send(entry);
        this.remove(entry);
        return reply;
      } catch (error) {
        const mayPass = error instanceof Unreachable || (error instanceof Refused && error.mayPass);
        if (!mayPass) {
          this.dropIfUseless(entry, error);
          throw error;
        }
        const asked = (error.retryAfter ?? 0) * 1000;
        await this.rest(Math.max(wait, asked));
        wait = Math.min(wait * 2, LONGEST_WAIT_MS);
      }
    }
  }

  /** One try; a stale CSRF token is replaced once. */
  async send(entry) {
    try {
      return await post(entry.path, entry.body);
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 403) {
        throw error;
      }
      await openSession(this.person);
      return await post(entry.path, entry.body);
    }
  }

  dropIfUseless(entry, error) {
    if (error instanceof Refused && error.status !== 401 && error.status !== 403) {
      this.remove(entry);
    }
  }

  rest(milliseconds) {
    this.report("retrying");
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
