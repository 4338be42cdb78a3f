// Search in pages opened from a folder: there a browser starts no worker, so the theme's search runs
// in a frame that cannot be seen. The theme looks for this class by its name.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.window = frame.contentWindow
      this.window.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = this.window.document.createElement("script")
      script.src = url
      this.ready = new Promise((loaded) => { script.onload = loaded })
      this.window.document.body.append(script)
    }

    async postMessage(data) {
      await this.ready
      this.window.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
  window.Worker = window.IFrameWorker
}
