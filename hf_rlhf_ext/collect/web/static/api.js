// Requests to the server. Every failure is one of two errors: the server refused, or it could not be reached.

/** The server answered with an error: `status`, its message in one line, and when to try again (seconds or null). */
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  /** True if the same request can succeed later: too many requests, or trouble inside the server. */
  get mayPass() {
    return this.status === 429 || this.status >= 500;
  }
}

/** No answer: no network, the server is down, or it took too long. The request may or may not have arrived. */
export class Unreachable extends Error {}

/** The browser is signed in as someone else by now: nothing may be shown or sent under that name. */
export class OtherPerson extends Error {}

const TIMEOUT_MS = 20_000;
let csrf = "";

async function call(path, options) {
  let response;
  let body;
  try {
    response = await fetch(path, { ...options, credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) });
    body = await response.text();
  } catch (error) {
    throw new Unreachable(String(error));
  }
  let parsed = null;
  try {
    parsed = JSON.parse(body);
  } catch {
    // A proxy between here and the server answers with its own page.
  }
  if (!response.ok) {
    const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
    throw new Refused(response.status, parsed?.error ?? `the server said ${response.status}`, wait || null);
  }
  if (parsed === null) {
    throw new Unreachable("the reply was not JSON");
  }
  return parsed;
}

export function get(path) {
  return call(path, { headers: { Accept: "application/json" } });
}

export function post(path, body) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(body),
  });
}

/** Who is signed in, and the token that posts need. That of somebody else than `person` is not taken. */
export async function openSession(person = null) {
  const session = await get("/api/session");
  if (person !== null && session.name !== person) {
    throw new OtherPerson(session.name);
  }
  csrf = session.csrf;
  return session;
}
