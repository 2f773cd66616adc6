// Search on pages opened from the disk. Browsers refuse workers there, so the search runs in a hidden frame instead, with
// the part of the Worker interface that the theme uses. Pages that come from a server keep real workers.
class IframeWorker extends EventTarget {
  constructor(url) {
    super()
    const source = new URL(url, document.baseURI).href
    this.frame = document.createElement("iframe")
    this.frame.hidden = true
    document.body.appendChild(this.frame)
    this.scope = this.frame.contentWindow
    const page = this.scope.document
    page.open()
    page.write("<!doctype html><body></body>")
    page.close()

    // What a script expects to find in a worker.
    this.scope.postMessage = (data) => {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      this.onmessage?.(event)
    }
    this.scope.importScripts = (...urls) => urls.reduce((done, each) => done.then(() => this.load(each)), Promise.resolve())
    this.ready = this.load(source)
  }

  load(url) {
    return new Promise((resolve, reject) => {
      const script = this.scope.document.createElement("script")
      script.src = url
      script.onload = resolve
      script.onerror = () => reject(new Error(`cannot load ${url}`))
      this.scope.document.body.appendChild(script)
    })
  }

  postMessage(data) {
    this.ready.then(() => {
      const event = new MessageEvent("message", { data: structuredClone(data) })
      this.scope.dispatchEvent(event)
      this.scope.onmessage?.(event)
    })
  }

  terminate() {
    this.frame.remove()
  }
}

if (location.protocol === "file:") window.Worker = IframeWorker
