// Seconds that a person has had a task before their eyes: the time while the page is visible.

export class Clock {
  constructor() {
    this.spent = 0; // milliseconds until `since`
    this.since = null; // null: stopped or hidden
    this.running = false;
    document.addEventListener("visibilitychange", () => this.follow());
  }

  /** Starts for a new task; `seconds` were spent on it before a reload. */
  start(seconds = 0) {
    this.spent = seconds * 1000;
    this.since = null;
    this.running = true;
    this.follow();
  }

  stop() {
    this.running = false;
    this.follow();
  }

  seconds() {
    const now = this.since === null ? 0 : performance.now() - this.since;
    return Math.round((this.spent + now) / 100) / 10;
  }

  follow() {
    const counts = this.running && document.visibilityState === "visible";
    if (counts && this.since === null) {
      this.since = performance.now();
    } else if (!counts && this.since !== null) {
      this.spent += performance.now() - this.since;
      this.since = null;
    }
  }
}
