// Browsers start no worker in a page that was opened as a file. There, a hidden frame does its work.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      // what a worker has and a frame lacks: messages to the page, and scripts that are loaded in order
      frame.srcdoc = `<script>
        var postMessage = (data) => parent.postMessage(data, "*");
        var importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(
          (done) => {
            const script = document.createElement("script");
            script.src = url;
            script.onload = done;
            document.body.appendChild(script);
          })), Promise.resolve());
      </` + `script><body><script src="${new URL(url, location)}"></` + `script></body>`;
      document.body.appendChild(frame);
      this.frame = frame;
      this.ready = new Promise((done) => (frame.onload = done));
      window.addEventListener("message", (event) => {
        if (event.source !== frame.contentWindow) return;
        event.stopImmediatePropagation();
        const copy = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      });
    }
    postMessage(data) {
      // the frame's own function was replaced by that of a worker
      this.ready.then(() => window.postMessage.call(this.frame.contentWindow, data, "*"));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
