import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * Writes to a Kafka broker as told on standard input, and prints how long it took.
 *
 * <p>Argument: HOST:PORT. A line in: {@code WRITERS MESSAGES BYTES BATCH_BYTES}; MESSAGES is each writer's, and a
 * negative BATCH_BYTES leaves the producer's default. A line out: the seconds from the first send to the
 * last ack. It lives on between lines, so that all but the first meet compiled code.
 */
public final class Writers {
  private static final String TOPIC = "load";

  public static void main(String[] arguments) throws Exception {
    try (Admin admin = Admin.create(Map.of("bootstrap.servers", arguments[0]))) {
      NewTopic topic = new NewTopic(TOPIC, 1, (short) 1).configs(Map.of("flush.messages", "1"));
      admin.createTopics(List.of(topic)).all().get();
    }
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      int[] numbers = java.util.Arrays.stream(line.split(" ")).mapToInt(Integer::parseInt).toArray();
      System.out.println(write(arguments[0], numbers[0], numbers[1], numbers[2], numbers[3]));
      System.out.flush();
    }
  }

  private static double write(String broker, int writers, int messages, int bytes, int batch)
      throws Exception {
    byte[] value = new byte[bytes];
    new Random(1).nextBytes(value);
    Map<String, Object> settings = new java.util.HashMap<>(Map.of("bootstrap.servers", broker, "acks", "all"));
    if (batch >= 0) {
      settings.put("batch.size", batch);
    }
    List<KafkaProducer<byte[], byte[]>> producers = new ArrayList<>();
    for (int number = 0; number < writers; number++) {
      KafkaProducer<byte[], byte[]> producer =
          new KafkaProducer<>(settings, new ByteArraySerializer(), new ByteArraySerializer());
      producer.partitionsFor(TOPIC);
      producers.add(producer);
    }
    AtomicReference<Exception> failed = new AtomicReference<>();
    List<Thread> threads = new ArrayList<>();
    for (KafkaProducer<byte[], byte[]> producer : producers) {
      threads.add(
          new Thread(
              () -> {
                for (int number = 0; number < messages; number++) {
                  producer.send(
                      new ProducerRecord<>(TOPIC, value),
                      (metadata, error) -> {
                        if (error != null) {
                          failed.set(error);
                        }
                      });
                }
                // Returns when everything has been acked.
                producer.flush();
              }));
    }
    long started = System.nanoTime();
    for (Thread thread : threads) {
      thread.start();
    }
    for (Thread thread : threads) {
      thread.join();
    }
    double seconds = (System.nanoTime() - started) / 1e9;
    for (KafkaProducer<byte[], byte[]> producer : producers) {
      producer.close();
    }
    if (failed.get() != null) {
      throw new ExecutionException(failed.get());
    }
    return seconds;
  }
}
