// Search when the site is opened from disk: browsers start no worker there, so the search script runs in a hidden frame.
// The theme finds it by the name IFrameWorker; without this file it would fetch such a script from the network.
if (location.protocol === "file:") {
  const setup = `
    postMessage = (data) => parent.dispatchEvent(new MessageEvent("frame-message", { data }));
    importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((loaded) => {
      const script = document.createElement("script");
      script.src = url;
      script.onload = script.onerror = loaded;
      document.body.appendChild(script);
    })), Promise.resolve());`;

  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.appendChild(this.frame);
      this.forward = ({ data }) => {
        const message = new MessageEvent("message", { data });
        this.dispatchEvent(message);
        this.onmessage?.(message);
      };
      addEventListener("frame-message", this.forward);
      this.ready = new Promise((loaded) => { this.frame.onload = loaded; });
      const page = this.frame.contentDocument;
      page.open();
      page.write(`<body><script>${setup}<\/script><script src="${new URL(url, location.href)}"><\/script></body>`);
      page.close();
    }

    postMessage(data) {
      const { contentWindow } = this.frame;
      this.ready.then(() => contentWindow.dispatchEvent(new contentWindow.MessageEvent("message", { data })));
    }

    terminate() {
      removeEventListener("frame-message", this.forward);
      this.frame.remove();
    }
  };
}
