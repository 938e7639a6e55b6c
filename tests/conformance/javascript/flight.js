// Flight over grpc-js: the stub, Arrow batches as FlightData, and one DoExchange with its acks.

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import {
  Field,
  Int64,
  makeData,
  Message,
  RecordBatch,
  RecordBatchStreamWriter,
  Schema,
  Struct,
  Utf8,
} from 'apache-arrow';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { AckLedger } from './acks.js';

const definition = protoLoader.loadSync(fileURLToPath(new URL('Flight.proto', import.meta.url)), {
  keepCase: true,
  enums: String,
  // proto3 leaves empty bytes out: a body that is not there reads as an empty one.
  defaults: true,
});
const { FlightService } = grpc.loadPackageDefinition(definition).arrow.flight.protocol;

const LABEL_BYTES = 20;

const SCHEMA = new Schema([Field.new('id', new Int64(), false), Field.new('label', new Utf8(), true)]);

// A channel with grpc-js's stock settings but for one: channels to the same address share a connection otherwise, and
// closing one of them would not close it.
export function dial(address) {
  return new FlightService(address, grpc.credentials.createInsecure(), { 'grpc.use_local_subchannel_pool': 1 });
}

export const pathDescriptor = (table) => ({ type: 'PATH', path: [table] });

export const encodeJson = (value) => Buffer.from(JSON.stringify(value));

// Rows with ids from `first`.
export function newBatch(first, rows) {
  const ids = new BigInt64Array(rows);
  const offsets = new Int32Array(rows + 1);
  const labels = Buffer.alloc(rows * LABEL_BYTES);
  for (let n = 0; n < rows; n++) {
    ids[n] = BigInt(first + n);
    offsets[n + 1] = (n + 1) * LABEL_BYTES;
    labels.write(`label-${String(first + n).padStart(14, '0')}`, n * LABEL_BYTES, 'latin1');
  }
  const children = [
    makeData({ type: new Int64(), length: rows, nullCount: 0, data: ids }),
    makeData({ type: new Utf8(), length: rows, nullCount: 0, valueOffsets: offsets, data: labels }),
  ];
  const type = new Struct(SCHEMA.fields);
  return new RecordBatch(SCHEMA, makeData({ type, length: rows, nullCount: 0, children }));
}

// Cuts the Arrow IPC stream of a batch into the messages that Flight carries: the schema, then the batch.
function flightMessages(batch) {
  const stream = RecordBatchStreamWriter.writeAll([batch]).toUint8Array(true);
  const view = new DataView(stream.buffer, stream.byteOffset, stream.byteLength);
  const messages = [];
  for (let offset = 0; offset + 8 <= stream.length; ) {
    const headerBytes = view.getInt32(offset + 4, true);
    if (headerBytes === 0) break;
    const header = stream.subarray(offset + 8, offset + 8 + headerBytes);
    const bodyStart = offset + 8 + headerBytes;
    offset = bodyStart + Number(Message.decode(header).bodyLength);
    messages.push({ data_header: header, data_body: stream.subarray(bodyStart, offset) });
  }
  return messages;
}

// Puts the Arrow IPC stream of a DoGet together again.
export function ipcStream(messages) {
  const parts = messages.flatMap(({ data_header: header, data_body: body }) => {
    const padding = -header.length & 7;
    const prefix = Buffer.alloc(8);
    prefix.writeUInt32LE(0xffffffff, 0);
    prefix.writeInt32LE(header.length + padding, 4);
    return [prefix, header, Buffer.alloc(padding), body];
  });
  return Buffer.concat(parts);
}

// A stream of writes, DoExchange or DoPut. Its acks are checked as they come, while the caller writes.
export class WriteStream {
  // `request` goes with the schema message, as arrow-rs sends it: so it sets the stream's defaults (T18).
  constructor(client, method, table, request, options = {}) {
    this.ledger = new AckLedger();
    this.call = client[method](options);
    this.opening = { flight_descriptor: pathDescriptor(table) };
    if (request) this.opening.app_metadata = encodeJson(request);
    this.durability = request?.requested_durability ?? 'disk';
    this.failure = null;
    this.ended = false;
    this.waiters = [];
    this.call.on('data', (message) => this.#take(message));
    this.call.on('error', (error) => this.#end(error));
    this.call.on('end', () => this.#end(null));
  }

  #take(message) {
    try {
      if (message.data_header?.length > 0) throw new Error('an ack came with data');
      this.ledger.take(message.app_metadata.toString('utf8'));
    } catch (error) {
      this.failure ??= error;
    }
    this.#wake();
  }

  #end(error) {
    this.failure ??= error;
    this.ended = true;
    this.#wake();
  }

  #wake() {
    const waiters = this.waiters;
    this.waiters = [];
    for (const resolve of waiters) resolve();
  }

  async #send(message) {
    if (!this.call.write(message) && !this.ended) {
      // A stream that ends while its window is closed never drains.
      const drained = new AbortController();
      await Promise.race([once(this.call, 'drain', { signal: drained.signal }), this.#waitUntil(() => this.ended)]);
      drained.abort();
    }
  }

  async #waitUntil(condition) {
    while (!condition()) await new Promise((resolve) => this.waiters.push(resolve));
  }

  get counts() {
    return `${this.ledger.received} acks came, ${this.ledger.outstanding} did not`;
  }

  // Writes a batch; with a durability of its own if one is given. Waits while the stream's window is closed.
  async write(batch, ownDurability) {
    const [schema, data] = flightMessages(batch);
    if (this.opening) await this.#send({ ...schema, ...this.opening });
    this.opening = null;
    this.ledger.expect(ownDurability ?? this.durability, batch.numRows);
    await this.#send(ownDurability ? { ...data, app_metadata: encodeJson({ requested_durability: ownDurability }) } : data);
  }

  // Returns when so many acks have come, before the stream's end.
  async waitAcks(count) {
    await this.#waitUntil(() => this.failure || this.ended || this.ledger.received >= count);
    if (this.failure) throw this.failure;
    if (this.ledger.received < count) throw new Error(`the stream ended before ack ${count}: ${this.counts}`);
  }

  // Returns when the stream has ended with OK and each write has had all its acks.
  async waitEnd() {
    await this.#waitUntil(() => this.ended || this.failure);
    if (this.failure) throw new Error(`${this.counts}: ${this.failure.message}`);
    if (this.ledger.outstanding > 0) throw new Error(`the stream ended with OK: ${this.counts}`);
  }

  // Returns what ended the stream: null for OK.
  async waitFailure() {
    await this.#waitUntil(() => this.ended);
    return this.failure;
  }
}
