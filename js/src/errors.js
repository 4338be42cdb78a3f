/** Anything wrong with a file, an input, or the engine. */
export class QSNNError extends Error {
  constructor(message) {
    super(message);
    this.name = "QSNNError";
  }
}
