// Browsers start no workers from file: addresses. Where these pages are opened from a disk, the search's worker runs in a
// hidden frame instead. Elsewhere this does nothing. (Under this name the theme takes it in place of one from the network.)
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(address) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const later = (receiver, data) => setTimeout(() => receiver.onmessage?.({ data }));
      inside.postMessage = (data) => later(this, data);
      this.ready = new Promise((resolve, reject) => {
        const script = inside.document.createElement("script");
        script.src = address;
        script.onload = resolve;
        script.onerror = (event) => reject(this.onerror?.(event));
        inside.document.body.append(script);
      });
      this.postMessage = (data) => this.ready.then(() => later(inside, data), () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
}
