package arka.conformance;

import java.nio.charset.StandardCharsets;
import java.util.List;
import org.apache.arrow.flight.CallOption;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.FieldType;
import org.apache.arrow.vector.types.pojo.Schema;

/** One DoExchange: written by the caller, its acks read by a thread. */
final class Exchange implements AutoCloseable {
  static final Schema SCHEMA =
      new Schema(
          List.of(
              new Field("id", FieldType.notNullable(new ArrowType.Int(64, true)), null),
              new Field("label", FieldType.nullable(new ArrowType.Utf8()), null)));

  private final BufferAllocator allocator;
  private final FlightClient.ExchangeReaderWriter exchange;
  private final VectorSchemaRoot root;
  private final String durability;
  final AckReader acks;

  /**
   * Sends the schema, then the stream's defaults in a metadata-only message: Java's client puts the descriptor on
   * the schema message and cannot send it earlier.
   */
  Exchange(FlightClient client, BufferAllocator allocator, String table, String durability, CallOption... options) {
    this.allocator = allocator;
    this.durability = durability;
    this.exchange = client.doExchange(FlightDescriptor.path(table), options);
    this.root = VectorSchemaRoot.create(SCHEMA, allocator);
    this.acks = new AckReader(this::receive);
    exchange.getWriter().start(root);
    exchange.getWriter().putMetadata(request(durability));
  }

  private String receive() {
    FlightStream reader = exchange.getReader();
    if (!reader.next()) {
      return null;
    }
    if (reader.hasRoot()) {
      throw new AssertionError("an ack came with data");
    }
    return AckReader.text(reader.getLatestMetadata());
  }

  private ArrowBuf request(String requestedDurability) {
    byte[] json = ("{\"requested_durability\": \"" + requestedDurability + "\"}").getBytes(StandardCharsets.UTF_8);
    ArrowBuf buffer = allocator.buffer(json.length);
    buffer.writeBytes(json);
    return buffer;
  }

  /** Fills a root with rows whose ids begin at first. */
  static void fill(VectorSchemaRoot root, long first, int rows) {
    root.clear();
    BigIntVector ids = (BigIntVector) root.getVector("id");
    VarCharVector labels = (VarCharVector) root.getVector("label");
    ids.allocateNew(rows);
    labels.allocateNew(20L * rows, rows);
    for (int n = 0; n < rows; n++) {
      ids.set(n, first + n);
      labels.setSafe(n, String.format("label-%014d", first + n).getBytes(StandardCharsets.US_ASCII));
    }
    root.setRowCount(rows);
  }

  /** Writes a batch of the stream's default durability. */
  void write(long first, int rows) {
    fill(root, first, rows);
    acks.expect(durability, rows);
    exchange.getWriter().putNext();
  }

  /** Writes a batch with a WriteRequest of its own. */
  void write(long first, int rows, String ownDurability) {
    fill(root, first, rows);
    acks.expect(ownDurability, rows);
    exchange.getWriter().putNext(request(ownDurability));
  }

  void halfClose() {
    exchange.getWriter().completed();
  }

  void cancel() {
    exchange.getReader().cancel("the client has changed its mind", null);
  }

  @Override
  public void close() throws Exception {
    exchange.close();
    root.close();
  }
}
