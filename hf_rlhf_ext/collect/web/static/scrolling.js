// Answers that scroll in step: each is at the same share of its length, so that both end together.

export class StepScrolling {
  constructor(isOn) {
    this.isOn = isOn;
    this.expected = new Map(); // where a pane was put by this code: its scroll event is no wish of the person
  }

  watch(panes) {
    this.panes = panes;
    this.expected.clear();
    for (const pane of panes) {
      pane.addEventListener("scroll", () => this.follow(pane), { passive: true });
    }
  }

  follow(pane) {
    const isOwn = Math.abs((this.expected.get(pane) ?? -10) - pane.scrollTop) < 2;
    this.expected.delete(pane);
    if (!this.isOn || isOwn || !this.panes.includes(pane)) {
      return;
    }
    const length = pane.scrollHeight - pane.clientHeight;
    const share = length > 0 ? pane.scrollTop / length : 0;
    for (const other of this.panes) {
      const target = Math.round(share * (other.scrollHeight - other.clientHeight));
      if (other !== pane && Math.abs(other.scrollTop - target) >= 1) {
        this.expected.set(other, target);
        other.scrollTop = target;
      }
    }
  }
}
