import java.io.ByteArrayOutputStream;
import java.nio.BufferUnderflowException;
import java.nio.ByteBuffer;

/**
 * What the plain messages at the beginning of a connection say about its handshake: it is full when
 * the server sends a certificate or, in TLS 1.3, which encrypts that, chooses no pre-shared key.
 */
final class Handshake {
  /** What a handshake was: full, or resumed by one of the mechanisms. */
  enum Kind {
    FULL,
    SESSION_ID,
    TICKET,
    PSK
  }

  private static final int CLIENT_HELLO = 1, SERVER_HELLO = 2, CERTIFICATE = 11;
  private static final int SESSION_TICKET = 35, PRE_SHARED_KEY = 41, SUPPORTED_VERSIONS = 43;

  /** Messages so far, without the headers of their records; null once all is known. */
  private ByteArrayOutputStream ours = new ByteArrayOutputStream();

  private ByteArrayOutputStream theirs = new ByteArrayOutputStream();
  private boolean offersTicket;
  private boolean certified;
  private Kind mechanism;

  void received(ByteBuffer buffer, int from, int to) {
    if (theirs != null && to > from) {
      try {
        collect(theirs, buffer, from, to);
        ByteBuffer hello = message(theirs, CLIENT_HELLO);
        if (hello != null) {
          ByteBuffer ticket = extension(hello, true, SESSION_TICKET);
          offersTicket = ticket != null && ticket.hasRemaining();
          theirs = null;
        }
      } catch (IndexOutOfBoundsException | IllegalArgumentException | BufferUnderflowException e) {
        theirs = null; // a damaged hello is JSSE's to refuse
      }
    }
  }

  void sent(ByteBuffer buffer, int from, int to) {
    if (ours == null || to == from) {
      return;
    }
    boolean plain = collect(ours, buffer, from, to);
    ByteBuffer hello = message(ours, SERVER_HELLO);
    if (hello != null) {
      boolean tls13 = extension(hello, false, SUPPORTED_VERSIONS) != null;
      mechanism = tls13 ? Kind.PSK : offersTicket ? Kind.TICKET : Kind.SESSION_ID;
      certified =
          tls13 ? extension(hello, false, PRE_SHARED_KEY) == null : message(ours, CERTIFICATE) != null;
      if (tls13 || certified || !plain) {
        ours = null;
      }
    }
  }

  /** What it was, once it has succeeded. */
  Kind kind() {
    return certified ? Kind.FULL : mechanism;
  }

  /** Adds the plain messages of some records; false when it came to one of another kind. */
  private static boolean collect(ByteArrayOutputStream to, ByteBuffer from, int at, int end) {
    final int header = 5, handshake = 22;
    while (at + header <= end && from.get(at) == handshake) {
      int length = from.getShort(at + 3) & 0xffff;
      for (int i = at + header; i < Math.min(at + header + length, end); i++) {
        to.write(from.get(i));
      }
      at += header + length;
    }
    return at >= end;
  }

  /** The first message of a type, or null. A HelloRetryRequest is not one. */
  private static ByteBuffer message(ByteArrayOutputStream all, int type) {
    ByteBuffer rest = ByteBuffer.wrap(all.toByteArray());
    while (rest.remaining() >= 4) {
      int header = rest.getInt();
      int length = header & 0xffffff;
      if (rest.remaining() < length) {
        return null;
      }
      ByteBuffer message = rest.slice();
      message.limit(length);
      if (header >>> 24 == type && !(type == SERVER_HELLO && retries(message))) {
        return message;
      }
      rest.position(rest.position() + length);
    }
    return null;
  }

  /** Whether a ServerHello has the random of a HelloRetryRequest, RFC 8446 section 4.1.3. */
  private static boolean retries(ByteBuffer hello) {
    return hello.getInt(2) == 0xcf21ad74 && hello.getInt(6) == 0xe59a6111;
  }

  /** The value of a hello's extension, or null. */
  private static ByteBuffer extension(ByteBuffer message, boolean client, int type) {
    final int versionAndRandom = 34;
    ByteBuffer hello = message.duplicate();
    hello.position(versionAndRandom);
    hello.position(hello.position() + 1 + (hello.get(hello.position()) & 0xff));
    if (client) {
      // Its lists of cipher suites and compression methods.
      hello.position(hello.position() + 2 + (hello.getShort(hello.position()) & 0xffff));
      hello.position(hello.position() + 1 + (hello.get(hello.position()) & 0xff));
    } else {
      hello.position(hello.position() + 3);
    }
    if (hello.remaining() < 2) {
      return null;
    }
    hello.getShort();
    while (hello.remaining() >= 4) {
      int found = hello.getShort() & 0xffff;
      int length = hello.getShort() & 0xffff;
      if (found == type) {
        ByteBuffer value = hello.slice();
        value.limit(length);
        return value;
      }
      hello.position(hello.position() + length);
    }
    return null;
  }
}
