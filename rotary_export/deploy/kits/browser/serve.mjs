// Serves this folder on 127.0.0.1: node serve.mjs [PORT]

import { realpathSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import path from "node:path";

const TYPES = {
  ".css": "text/css",
  ".html": "text/html; charset=utf-8",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm", // with another type, compilation starts only after the whole file
};

/**
 * Start a server; it ends with its close().
 * @param {string} root The folder.
 * @param {number} port 0: any that is free.
 * @returns {Promise<import("node:http").Server>} Listening.
 */
export async function startServer(root, port) {
  const server = createServer(async (request, response) => {
    try {
      const name = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
      const file = path.join(root, name.endsWith("/") ? `${name}index.html` : name);
      if (!file.startsWith(root + path.sep)) throw new Error("outside the folder");
      const body = await readFile(file);
      const type = TYPES[path.extname(file)] ?? "application/octet-stream";
      response.writeHead(200, { "Content-Type": type, "Cache-Control": "no-cache" }).end(body);
    } catch {
      response.writeHead(404).end("not found\n");
    }
  });
  await new Promise((resolve, reject) => {
    server.once("error", reject).listen(port, "127.0.0.1", resolve);
  });
  return server;
}

if (process.argv[1] && realpathSync(process.argv[1]) === import.meta.filename) {
  const port = Number(process.argv[2] ?? 8000);
  try {
    await startServer(import.meta.dirname, port);
    console.log(`open http://127.0.0.1:${port}/ (Ctrl-C ends)`);
  } catch (error) {
    console.error(`error: ${error.message}; another port: node serve.mjs PORT`);
    process.exitCode = 1;
  }
}
