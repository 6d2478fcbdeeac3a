import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.KeyStore;
import java.util.Collections;
import java.util.EnumMap;
import java.util.Map;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicLong;
import javax.net.ssl.KeyManager;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.SSLEngineResult;
import javax.net.ssl.SSLException;
import javax.servlet.http.HttpServletRequest;
import javax.servlet.http.HttpServletResponse;
import org.eclipse.jetty.alpn.server.ALPNServerConnectionFactory;
import org.eclipse.jetty.http.HttpFields;
import org.eclipse.jetty.http2.server.HTTP2ServerConnectionFactory;
import org.eclipse.jetty.io.ChannelEndPoint;
import org.eclipse.jetty.io.EndPoint;
import org.eclipse.jetty.io.ManagedSelector;
import org.eclipse.jetty.io.SocketChannelEndPoint;
import org.eclipse.jetty.io.ssl.SslConnection;
import org.eclipse.jetty.io.ssl.SslHandshakeListener;
import org.eclipse.jetty.server.ConnectionFactory;
import org.eclipse.jetty.server.Connector;
import org.eclipse.jetty.server.HttpConfiguration;
import org.eclipse.jetty.server.HttpConnectionFactory;
import org.eclipse.jetty.server.Request;
import org.eclipse.jetty.server.Response;
import org.eclipse.jetty.server.Server;
import org.eclipse.jetty.server.ServerConnector;
import org.eclipse.jetty.server.SslConnectionFactory;
import org.eclipse.jetty.server.handler.AbstractHandler;
import org.eclipse.jetty.util.BufferUtil;
import org.eclipse.jetty.util.ssl.SslContextFactory;
import org.eclipse.jetty.util.thread.QueuedThreadPool;

/**
 * A Jetty server for tests that counts its own handshakes, by what it sends and receives: TLS is
 * Jetty's own affair.
 *
 * <p>Arguments: certificate file, key file (PEM, PKCS #8), TLS protocol or "any", "own" or "plain",
 * "close" or "keep", "h1" or "h2", "strict" or "lenient", and the port, 0 for any. With plain, Jetty
 * does not choose certificates by SNI. With strict, a connection that the client ends without
 * close_notify takes its session along, as in old Java. It prints "READY tlsPort adminPort".
 */
public final class Backend {
  /** Completed handshakes by what they were. */
  private static final Map<Handshake.Kind, AtomicLong> handshakes =
      new EnumMap<>(Handshake.Kind.class);

  static {
    for (Handshake.Kind kind : Handshake.Kind.values()) {
      handshakes.put(kind, new AtomicLong());
    }
  }

  private static final AtomicLong failed = new AtomicLong();
  private static final AtomicLong connections = new AtomicLong();
  private static final AtomicLong requests = new AtomicLong();
  private static final AtomicLong unclean = new AtomicLong();
  private static final AtomicLong resets = new AtomicLong();

  private Backend() {}

  public static void main(String[] args) throws Exception {
    KeyStore keys = Pem.keyStore(Path.of(args[0]), Path.of(args[1]));
    String protocol = args[2];
    boolean plain = args[3].equals("plain");
    boolean closeEach = args[4].equals("close");
    boolean http2 = args[5].equals("h2");
    boolean strict = args[6].equals("strict");
    int port = Integer.parseInt(args[7]);

    QueuedThreadPool threads = new QueuedThreadPool(200, 8);
    threads.setDaemon(true);
    Server server = new Server(threads);
    ServerConnector tls = tlsConnector(server, keys, protocol, plain, http2, strict);
    tls.setPort(port);
    ServerConnector admin = new ServerConnector(server, 1, 1);
    admin.setHost("127.0.0.1");
    server.addConnector(tls);
    server.addConnector(admin);
    server.setHandler(new Content(tls, closeEach));
    server.start();
    System.out.println("READY " + tls.getLocalPort() + " " + admin.getLocalPort());
    server.join();
  }

  private static ServerConnector tlsConnector(
      Server server, KeyStore keys, String protocol, boolean plain, boolean http2, boolean strict) {
    SslContextFactory.Server context = plain ? new Plain() : new SslContextFactory.Server();
    context.setKeyStore(keys);
    context.setKeyStorePassword("");
    if (!protocol.equals("any")) {
      context.setIncludeProtocols(protocol);
      context.setExcludeProtocols();
    }
    HttpConfiguration config = new HttpConfiguration();
    config.setSendServerVersion(false);
    HttpConnectionFactory http1 = new HttpConnectionFactory(config);
    ServerConnector connector;
    if (http2) {
      ALPNServerConnectionFactory alpn = new ALPNServerConnectionFactory("h2", "http/1.1");
      alpn.setDefaultProtocol("http/1.1");
      connector =
          new CountingConnector(
              server,
              new CountingTLS(context, "alpn", strict),
              alpn,
              new HTTP2ServerConnectionFactory(config),
              http1);
    } else {
      connector = new CountingConnector(server, new CountingTLS(context, "http/1.1", strict), http1);
    }
    connector.setHost("127.0.0.1");
    connector.setAcceptQueueSize(512);
    connector.setIdleTimeout(120_000);
    return connector;
  }

  /**
   * Without Jetty's key manager, which chooses by SNI as soon as a certificate has two names and
   * leaves a value in the session: JSSE then makes no stateless tickets.
   */
  private static final class Plain extends SslContextFactory.Server {
    @Override
    protected KeyManager[] getKeyManagers(KeyStore store) throws Exception {
      KeyManagerFactory factory =
          KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
      factory.init(store, new char[0]);
      return factory.getKeyManagers();
    }
  }

  /** Makes connections that count. */
  private static final class CountingTLS extends SslConnectionFactory {
    private final boolean strict;

    CountingTLS(SslContextFactory.Server context, String next, boolean strict) {
      super(context, next);
      this.strict = strict;
    }

    @Override
    protected SslConnection newSslConnection(
        Connector connector, EndPoint endPoint, SSLEngine engine) {
      connections.incrementAndGet();
      CountingConnection connection = new CountingConnection(connector, endPoint, engine, this, strict);
      connection.addHandshakeListener(
          new SslHandshakeListener() {
            @Override
            public void handshakeSucceeded(Event event) {
              handshakes.get(connection.handshake.kind()).incrementAndGet();
            }

            @Override
            public void handshakeFailed(Event event, Throwable failure) {
              failed.incrementAndGet();
            }
          });
      return connection;
    }
  }

  /** Sees resets, which Jetty turns into an end of input; some show only when it writes. */
  private static final class CountingConnector extends ServerConnector {
    CountingConnector(Server server, ConnectionFactory... factories) {
      super(server, 1, 1, factories);
    }

    @Override
    protected ChannelEndPoint newEndPoint(
        SocketChannel channel, ManagedSelector selectSet, SelectionKey key) {
      SocketChannelEndPoint endPoint =
          new SocketChannelEndPoint(channel, selectSet, key, getScheduler()) {
            private final AtomicBoolean counted = new AtomicBoolean();

            @Override
            public int fill(ByteBuffer buffer) throws IOException {
              if (isInputShutdown()) {
                return -1;
              }
              int position = BufferUtil.flipToFill(buffer);
              try {
                int filled = channel.read(buffer);
                if (filled > 0) {
                  notIdle();
                } else if (filled < 0) {
                  shutdownInput();
                }
                return filled;
              } catch (IOException e) {
                countReset(e);
                shutdownInput();
                return -1;
              } finally {
                BufferUtil.flipToFlush(buffer, position);
              }
            }

            @Override
            public boolean flush(ByteBuffer... buffers) throws IOException {
              try {
                return super.flush(buffers);
              } catch (IOException e) {
                countReset(e);
                throw e;
              }
            }

            /** A broken pipe is not a reset: the client had ended with FIN before. */
            private void countReset(Throwable error) {
              for (Throwable e = error; e != null; e = e.getCause()) {
                if (String.valueOf(e.getMessage()).startsWith("Connection reset")) {
                  if (counted.compareAndSet(false, true)) {
                    resets.incrementAndGet();
                  }
                  return;
                }
              }
            }
          };
      endPoint.setIdleTimeout(getIdleTimeout());
      return endPoint;
    }
  }

  /** Sees how a handshake goes and how the peer ends the connection. */
  private static final class CountingConnection extends SslConnection {
    private final boolean strict;
    private final Handshake handshake = new Handshake();
    private boolean notified;
    private boolean ended;

    CountingConnection(
        Connector connector,
        EndPoint endPoint,
        SSLEngine engine,
        SslConnectionFactory factory,
        boolean strict) {
      super(
          connector.getByteBufferPool(),
          connector.getExecutor(),
          endPoint,
          engine,
          factory.isDirectBuffersForEncryption(),
          factory.isDirectBuffersForDecryption());
      this.strict = strict;
    }

    @Override
    protected SSLEngineResult wrap(SSLEngine engine, ByteBuffer[] input, ByteBuffer output)
        throws SSLException {
      int from = output.position();
      SSLEngineResult result = super.wrap(engine, input, output);
      handshake.sent(output, from, output.position());
      return result;
    }

    @Override
    protected SSLEngineResult unwrap(SSLEngine engine, ByteBuffer input, ByteBuffer output)
        throws SSLException {
      int from = input.position();
      SSLEngineResult result = super.unwrap(engine, input, output);
      handshake.received(input, from, input.position());
      if (result.getStatus() == SSLEngineResult.Status.CLOSED) {
        notified = true;
      }
      return result;
    }

    @Override
    protected int networkFill(ByteBuffer input) throws IOException {
      try {
        int n = super.networkFill(input);
        if (n < 0) {
          end();
        }
        return n;
      } catch (IOException e) {
        end();
        throw e;
      }
    }

    @Override
    protected boolean networkFlush(ByteBuffer output) throws IOException {
      try {
        return super.networkFlush(output);
      } catch (IOException e) {
        // A reset in the middle of a response shows only here: Jetty no longer
        // reads.
        end();
        throw e;
      }
    }

    private synchronized void end() {
      if (ended) {
        return;
      }
      ended = true;
      if (!notified && !getSSLEngine().isOutboundDone()) {
        if (strict) {
          getSSLEngine().getSession().invalidate();
        }
        unclean.incrementAndGet();
      }
    }
  }

  /** Serves the content of package peers, and the counts on the plain connector. */
  private static final class Content extends AbstractHandler {
    private final Connector tls;
    private final boolean closeEach;
    private final byte[] pattern;

    Content(Connector tls, boolean closeEach) {
      this.tls = tls;
      this.closeEach = closeEach;
      this.pattern = new byte[10 << 20];
      for (int at = 0; at < pattern.length; at += 16) {
        int rest = at / 16;
        for (int digit = 14; digit >= 0; digit--, rest /= 10) {
          pattern[at + digit] = (byte) ('0' + rest % 10);
        }
        pattern[at + 15] = '\n';
      }
    }

    @Override
    public void handle(
        String target, Request base, HttpServletRequest request, HttpServletResponse response)
        throws IOException {
      base.setHandled(true);
      if (base.getHttpChannel().getConnector() != tls) {
        counts(response);
        return;
      }
      requests.incrementAndGet();
      if (closeEach) {
        response.setHeader("Connection", "close");
      }
      response.setContentType("text/plain");
      switch (target) {
        case "/0":
          response.setContentLength(0);
          break;
        case "/1k":
          fixed(response, 1 << 10);
          break;
        case "/256k":
          fixed(response, 256 << 10);
          break;
        case "/10m":
          fixed(response, 10 << 20);
          break;
        case "/chunked":
          parts(response, 64 << 10, 0);
          break;
        case "/slow":
          parts(response, 1 << 10, 50);
          break;
        case "/endless":
          while (true) {
            response.getOutputStream().write(pattern, 0, 64 << 10);
          }
        case "/trailers":
          trailers(response);
          break;
        case "/304":
          response.setHeader("ETag", "\"1\"");
          response.setStatus(304);
          break;
        case "/early":
          byte[] early = "early\n".getBytes(StandardCharsets.US_ASCII);
          response.setContentLength(early.length);
          response.getOutputStream().write(early);
          response.flushBuffer();
          break;
        case "/echo":
          echo(request, response);
          break;
        case "/headers":
          headers(request, response);
          break;
        default:
          response.setStatus(
              target.matches("/status/[2-5][0-9][0-9]") ? Integer.parseInt(target.substring(8)) : 404);
      }
    }

    private void fixed(HttpServletResponse response, int size) throws IOException {
      response.setContentLength(size);
      response.getOutputStream().write(pattern, 0, size);
    }

    private void parts(HttpServletResponse response, int size, int pauseMillis) throws IOException {
      for (int i = 0; i < 8; i++) {
        if (i > 0 && pauseMillis > 0) {
          try {
            Thread.sleep(pauseMillis);
          } catch (InterruptedException e) {
            throw new IOException(e);
          }
        }
        response.getOutputStream().write(pattern, i * (size / 8), size / 8);
        response.flushBuffer();
      }
    }

    private void trailers(HttpServletResponse response) throws IOException {
      response.setHeader("Trailer", "X-Reseal-Check");
      ((Response) response)
          .setTrailers(
              () -> {
                HttpFields fields = new HttpFields();
                fields.put("X-Reseal-Check", "all-there");
                return fields;
              });
      response.getOutputStream().write(pattern, 0, 1 << 10);
      response.flushBuffer();
    }

    private void echo(HttpServletRequest request, HttpServletResponse response) throws IOException {
      if (request.getContentLengthLong() >= 0) {
        response.setContentLengthLong(request.getContentLengthLong());
      }
      InputStream in = request.getInputStream();
      OutputStream out = response.getOutputStream();
      in.transferTo(out);
    }

    private void headers(HttpServletRequest request, HttpServletResponse response)
        throws IOException {
      StringBuilder json = new StringBuilder("{");
      for (String name : Collections.list(request.getHeaderNames())) {
        json.append(json.length() > 1 ? "," : "").append(quote(name)).append(":[");
        String comma = "";
        for (String value : Collections.list(request.getHeaders(name))) {
          json.append(comma).append(quote(value));
          comma = ",";
        }
        json.append("]");
      }
      byte[] body = json.append("}\n").toString().getBytes(StandardCharsets.UTF_8);
      response.setContentType("application/json");
      response.setContentLength(body.length);
      response.getOutputStream().write(body);
    }

    private static String quote(String text) {
      StringBuilder quoted = new StringBuilder("\"");
      for (char c : text.toCharArray()) {
        if (c == '"' || c == '\\') {
          quoted.append('\\').append(c);
        } else if (c < ' ') {
          quoted.append(String.format("\\u%04x", (int) c));
        } else {
          quoted.append(c);
        }
      }
      return quoted.append('"').toString();
    }

    private static void counts(HttpServletResponse response) throws IOException {
      response.setContentType("application/json");
      response
          .getOutputStream()
          .print(
              String.format(
                  "{\"full\":%d,\"resumedSessionId\":%d,\"resumedTicket\":%d,\"resumedPsk\":%d,"
                      + "\"failed\":%d,\"connections\":%d,\"requests\":%d,"
                      + "\"unclean\":%d,\"resets\":%d}%n",
                  handshakes.get(Handshake.Kind.FULL).get(),
                  handshakes.get(Handshake.Kind.SESSION_ID).get(),
                  handshakes.get(Handshake.Kind.TICKET).get(),
                  handshakes.get(Handshake.Kind.PSK).get(),
                  failed.get(),
                  connections.get(),
                  requests.get(),
                  unclean.get(),
                  resets.get()));
    }
  }
}
