// Loaded between require.js and embed-amd.js, on pages with widgets.

// Their files lie beside this one.
requirejs.config({
  paths: { "@jupyter-widgets/html-manager/dist": new URL(".", document.currentScript.src).href.replace(/\/$/, "") },
});

// They typeset with MathJax 2's queue; the book has MathJax 3.
document.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax) {
    MathJax.Hub = {
      Queue: ([, , element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element])),
    };
  }
});
