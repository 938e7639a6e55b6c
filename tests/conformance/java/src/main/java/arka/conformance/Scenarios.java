package arka.conformance;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import org.apache.arrow.flight.Action;
import org.apache.arrow.flight.CallOptions;
import org.apache.arrow.flight.CallStatus;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightGrpcUtils;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStatusCode;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.flight.PutResult;
import org.apache.arrow.flight.Result;
import org.apache.arrow.flight.SyncPutListener;
import org.apache.arrow.flight.Ticket;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.VectorSchemaRoot;

/** The scenarios; they share one channel as an application's calls would. */
final class Scenarios implements AutoCloseable {
  private static final int ONE_ROW_WRITES = 100;
  private static final int LARGE_WRITES = 4;
  /** 8 MiB: 8 bytes of id, 4 of offset and 20 of label in each row. */
  private static final int LARGE_ROWS = 262_144;
  /** Enough for the cancellation to fall into the middle of them. */
  private static final int CANCELLED_WRITES = 8;
  private static final int CLOSE_WRITES = 20;
  private static final ObjectMapper JSON = new ObjectMapper();

  private final String address;
  /** Makes this run's table names its own. */
  private final String suffix = UUID.randomUUID().toString().substring(0, 8);
  private final BufferAllocator allocator = new RootAllocator();
  private final ManagedChannel channel;
  private final FlightClient client;

  Scenarios(String address) {
    this.address = address;
    this.channel = dial();
    this.client = FlightGrpcUtils.createFlightClientWithSharedChannel(allocator, channel);
  }

  private ManagedChannel dial() {
    return ManagedChannelBuilder.forTarget(address).usePlaintext().build();
  }

  private static void check(boolean holds, String complaint) {
    if (!holds) {
      throw new AssertionError(complaint);
    }
  }

  private Exchange open(String table, String durability) {
    return new Exchange(client, allocator, table, durability);
  }

  private String tableName(String name) {
    return "java_" + name + "_" + suffix;
  }

  private JsonNode create(String table) throws Exception {
    String fields =
        "{\"fields\": [{\"name\": \"id\", \"data_type\": \"int64\", \"nullable\": false},"
            + " {\"name\": \"label\", \"data_type\": \"utf8\"}]}";
    byte[] body =
        JSON.writeValueAsBytes(Map.of("name", table, "schema_json", fields, "table_type", "append_only"));
    Iterator<Result> results = client.doAction(new Action("CreateTable", body));
    JsonNode answer = JSON.readTree(results.next().getBody());
    check(!results.hasNext(), "expected one result");
    return answer;
  }

  private String fresh(String name) throws Exception {
    String table = tableName(name);
    create(table);
    return table;
  }

  /** Shows that the server still takes a write and acknowledges it, on the same channel. */
  private void oneWrite(String table) throws Exception {
    try (Exchange exchange = open(table, "disk")) {
      exchange.write(0, 1);
      exchange.halfClose();
      exchange.acks.waitEnd();
    }
  }

  /** A new table is created once; the same request again finds it. */
  String createTable() throws Exception {
    String table = tableName("create_table");
    JsonNode first = create(table);
    String uuid = first.path("table_uuid").asText();
    check(
        first.path("name").asText().equals("default." + table) && !uuid.isEmpty() && first.path("created").asBoolean(),
        "unexpected answer: " + first);
    JsonNode again = create(table);
    check(
        !again.path("created").asBoolean(true) && again.path("table_uuid").asText().equals(uuid),
        "the same table again: " + again);
    return first.path("name").asText();
  }

  /** Batches of one row are acknowledged while the stream is open for writing. */
  String oneRow() throws Exception {
    int expected = 2 * ONE_ROW_WRITES + 1;
    try (Exchange exchange = open(fresh("one_row"), "disk")) {
      exchange.write(0, 1, "object_storage");
      for (int id = 1; id < ONE_ROW_WRITES; id++) {
        exchange.write(id, 1);
      }
      exchange.acks.waitAcks(expected);
      exchange.halfClose();
      exchange.acks.waitEnd();
    }
    return ONE_ROW_WRITES + " writes, " + expected + " acks before the half-close";
  }

  /** Batches of 8 MiB go through all tiers. */
  String large() throws Exception {
    try (Exchange exchange = open(fresh("large"), "iceberg_committed")) {
      for (int n = 0; n < LARGE_WRITES; n++) {
        exchange.write((long) n * LARGE_ROWS, LARGE_ROWS);
      }
      exchange.halfClose();
      exchange.acks.waitEnd();
      return LARGE_WRITES + " writes of 8 MiB, " + exchange.acks.received() + " acks";
    }
  }

  /** A DoGet of what this scenario wrote arrives whole. */
  String readBack() throws Exception {
    String table = fresh("read_back");
    try (Exchange exchange = open(table, "iceberg_committed")) {
      exchange.write(0, LARGE_ROWS);
      exchange.write(LARGE_ROWS, 1);
      exchange.halfClose();
      exchange.acks.waitEnd();
    }
    long rows = 0;
    long sum = 0;
    try (FlightStream stream = client.getStream(new Ticket(table.getBytes(StandardCharsets.UTF_8)))) {
      while (stream.next()) {
        BigIntVector ids = (BigIntVector) stream.getRoot().getVector("id");
        rows += ids.getValueCount();
        for (int n = 0; n < ids.getValueCount(); n++) {
          sum += ids.get(n);
        }
      }
    }
    long count = LARGE_ROWS + 1L;
    check(rows == count && sum == count * (count - 1) / 2, "read " + rows + " rows with ids summing up to " + sum);
    return rows + " rows";
  }

  /** The same writes by DoPut, the acks as PutResults. */
  String doPut() throws Exception {
    String table = fresh("do_put");
    try (VectorSchemaRoot root = VectorSchemaRoot.create(Exchange.SCHEMA, allocator);
        SyncPutListener listener = new SyncPutListener()) {
      FlightClient.ClientStreamListener writer = client.startPut(FlightDescriptor.path(table), root, listener);
      AckReader acks =
          new AckReader(
              () -> {
                try (PutResult result = listener.read()) {
                  return result == null ? null : AckReader.text(result.getApplicationMetadata());
                }
              });
      for (int id = 0; id < ONE_ROW_WRITES; id++) {
        Exchange.fill(root, id, 1);
        acks.expect("disk", 1);
        writer.putNext();
      }
      writer.completed();
      acks.waitEnd();
      return acks.received() + " acks as PutResults";
    }
  }

  /** Opens a stream that the server must refuse and returns its status. */
  private CallStatus refused(String table) throws Exception {
    try (Exchange exchange = open(table, "disk")) {
      Throwable failure = exchange.acks.waitFailure();
      if (failure instanceof FlightRuntimeException status) {
        return status.status();
      }
      throw new AssertionError("a stream for " + table + " did not end with a status", failure);
    }
  }

  private String checkRefused(String table, FlightStatusCode code, String errorCode) throws Exception {
    CallStatus status = refused(table);
    String message = String.valueOf(status.description());
    check(
        status.code() == code && message.startsWith("[" + errorCode + "]") && message.contains(table),
        "expected " + code + " with [" + errorCode + "] and " + table + ", got " + status.code() + ": " + message);
    return message;
  }

  /** A stream for a table that is not there ends with NOT_FOUND and a message that names the table. */
  String notFound() throws Exception {
    return checkRefused(tableName("absent"), FlightStatusCode.NOT_FOUND, "table_not_found");
  }

  /** What a status message holds beyond ASCII arrives as it was written. */
  String statusText() throws Exception {
    return checkRefused("gr\u00f6\u00dfe%20", FlightStatusCode.INVALID_ARGUMENT, "invalid_request");
  }

  /** A client that cancels while large batches are on their way leaves the channel usable. */
  String cancel() throws Exception {
    String table = fresh("cancel");
    try (Exchange exchange = open(table, "disk")) {
      exchange.write(0, 1);
      exchange.acks.waitAcks(1);
      for (int n = 0; n < CANCELLED_WRITES; n++) {
        exchange.write(0, LARGE_ROWS);
      }
      // The acks of the first large batch prove that the server is in the middle of a stream of them.
      exchange.acks.waitAcks(4);
      exchange.cancel();
      Throwable failure = exchange.acks.waitFailure();
      check(
          failure instanceof FlightRuntimeException status && status.status().code() == FlightStatusCode.CANCELLED,
          "expected CANCELLED, got " + failure);
    }
    oneWrite(table);
    return "the next stream works";
  }

  /** An open, silent stream ends with DEADLINE_EXCEEDED, and the channel stays usable. */
  String deadline() throws Exception {
    String table = fresh("deadline");
    try (Exchange exchange =
        new Exchange(client, allocator, table, "memory", CallOptions.timeout(1, TimeUnit.SECONDS))) {
      exchange.write(0, 1);
      Throwable failure = exchange.acks.waitFailure();
      check(
          failure instanceof FlightRuntimeException status && status.status().code() == FlightStatusCode.TIMED_OUT,
          "expected TIMED_OUT, got " + failure);
    }
    oneWrite(table);
    return "the next stream works";
  }

  /** A channel that is shut down, which sends GOAWAY, goes on writing on its open call and gets every ack (T1). */
  String closeWithAcks() throws Exception {
    String table = fresh("close");
    ManagedChannel own = dial();
    FlightClient shared = FlightGrpcUtils.createFlightClientWithSharedChannel(allocator, own);
    try (Exchange exchange = new Exchange(shared, allocator, table, "iceberg_committed")) {
      for (int id = 0; id < CLOSE_WRITES; id++) {
        exchange.write(id, 1);
      }
      exchange.acks.waitAcks(1);
      own.shutdown();
      int outstanding = exchange.acks.outstanding();
      check(outstanding > 0, "no ack was outstanding at the shutdown: nothing was shown");
      for (int id = 0; id < CLOSE_WRITES; id++) {
        exchange.write(CLOSE_WRITES + id, 1);
      }
      exchange.halfClose();
      exchange.acks.waitEnd();
      check(own.awaitTermination(10, TimeUnit.SECONDS), "the channel did not terminate after its last call");
      return outstanding + " acks outstanding at shutdown(), all came, and those of " + CLOSE_WRITES + " more writes";
    }
  }

  /** Throws if a buffer was never released: only to be called when every scenario has run to its end. */
  @Override
  public void close() throws Exception {
    client.close();
    channel.shutdownNow();
    allocator.close();
  }
}
