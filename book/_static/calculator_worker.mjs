// The calculator's Python, in a thread of its own: Pyodide with the package's own files (peftlab-memory.zip).
// It tells the page how many bytes have come, then that it is ready, and then answers questions one after the other.
const PYTHON = new URL("vendor/pyodide/", import.meta.url);
const ARCHIVE = new URL("peftlab-memory.zip", import.meta.url);
const HOME = "/calculator";

// Pyodide loads its files with fetch, so counting there gives the true progress. Its largest file lies there packed.
const PACKED = "pyodide.asm.wasm";
let loaded = 0;
const plainFetch = self.fetch.bind(self);
self.fetch = async (address, options) => {
  const packed = String(address.url ?? address).endsWith(PACKED);
  const response = await plainFetch(packed ? `${address}.gzip` : address, options);
  if (!response.ok || !response.body) return response;
  const counter = new TransformStream({
    transform(chunk, out) {
      loaded += chunk.byteLength;
      self.postMessage({ loaded });
      out.enqueue(chunk);
    },
  });
  const counted = response.body.pipeThrough(counter);
  if (!packed) return new Response(counted, { status: response.status, headers: response.headers });
  const unpacked = counted.pipeThrough(new DecompressionStream("gzip"));
  return new Response(unpacked, { headers: { "Content-Type": "application/wasm" } });
};

async function archive() {
  const response = await fetch(ARCHIVE);
  if (!response.ok) throw new Error(`${ARCHIVE.pathname} cannot be loaded (${response.status})`);
  return response.arrayBuffer();
}

async function start() {
  const { loadPyodide } = await import(new URL("pyodide.mjs", PYTHON).href);
  const [python, files] = await Promise.all([loadPyodide({ indexURL: PYTHON.href }), archive()]);
  python.unpackArchive(files, "zip", { extractDir: HOME });
  python.runPython(`import os, sys; os.chdir("${HOME}"); sys.path.insert(0, "${HOME}")`);
  return python.pyimport("calculator_answers");
}

const answers = start();
answers.then(() => self.postMessage({ ready: true }), (error) => self.postMessage({ failed: String(error) }));

self.onmessage = async ({ data: { id, kind, question } }) => {
  try {
    const python = await answers;
    const began = performance.now();
    const text = python[kind](JSON.stringify(question));
    self.postMessage({ id, answer: JSON.parse(text), milliseconds: performance.now() - began });
  } catch (error) {
    self.postMessage({ id, failed: String(error) });
  }
};
