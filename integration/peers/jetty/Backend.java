import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.Socket;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.Principal;
import java.security.PrivateKey;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;
import java.util.Collections;
import java.util.Set;
import java.util.WeakHashMap;
import java.util.concurrent.atomic.AtomicLong;
import javax.net.ssl.KeyManager;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.SSLEngineResult;
import javax.net.ssl.SSLException;
import javax.net.ssl.X509ExtendedKeyManager;
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
 * A Jetty server for tests that counts its own handshakes.
 *
 * <p>Arguments: certificate file, key file (PEM, PKCS #8), TLS protocol, "close" or "keep", "h1" or
 * "h2", "strict" or "lenient": with strict a connection that the client ends without close_notify
 * takes its session along, as in old Java. Then the port, 0 for any. It prints "READY tlsPort
 * adminPort".
 */
public final class Backend {
  private static final AtomicLong full = new AtomicLong();
  private static final AtomicLong resumed = new AtomicLong();
  private static final AtomicLong failed = new AtomicLong();
  private static final AtomicLong connections = new AtomicLong();
  private static final AtomicLong requests = new AtomicLong();
  private static final AtomicLong unclean = new AtomicLong();
  private static final AtomicLong resets = new AtomicLong();

  /** Engines that were asked for a certificate: only a full handshake needs one. */
  private static final Set<SSLEngine> certified =
      Collections.synchronizedSet(Collections.newSetFromMap(new WeakHashMap<>()));

  private Backend() {}

  public static void main(String[] args) throws Exception {
    KeyStore keys = keyStore(Path.of(args[0]), Path.of(args[1]));
    String protocol = args[2];
    boolean closeEach = args[3].equals("close");
    boolean http2 = args[4].equals("h2");
    boolean strict = args[5].equals("strict");
    int port = Integer.parseInt(args[6]);

    QueuedThreadPool threads = new QueuedThreadPool(200, 8);
    threads.setDaemon(true);
    Server server = new Server(threads);
    ServerConnector tls = tlsConnector(server, keys, protocol, http2, strict);
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
      Server server, KeyStore keys, String protocol, boolean http2, boolean strict) {
    SslContextFactory.Server context =
        new SslContextFactory.Server() {
          @Override
          protected KeyManager[] getKeyManagers(KeyStore store) throws Exception {
            // Not Jetty's own, which picks by SNI and leaves a value in the session: JSSE then
            // makes no stateless tickets.
            KeyManagerFactory factory =
                KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
            factory.init(store, new char[0]);
            KeyManager[] managers = factory.getKeyManagers();
            for (int i = 0; i < managers.length; i++) {
              if (managers[i] instanceof X509ExtendedKeyManager) {
                managers[i] = new Recorder((X509ExtendedKeyManager) managers[i]);
              }
            }
            return managers;
          }
        };
    context.setKeyStore(keys);
    context.setKeyStorePassword("");
    context.setIncludeProtocols(protocol);
    context.setExcludeProtocols();
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

  private static KeyStore keyStore(Path certificate, Path key) throws Exception {
    Certificate[] chain;
    try (InputStream in = Files.newInputStream(certificate)) {
      chain =
          CertificateFactory.getInstance("X.509").generateCertificates(in).toArray(new Certificate[0]);
    }
    String pem =
        Files.readString(key).replaceAll("-----[A-Z ]+-----", "").replaceAll("\\s", "");
    PKCS8EncodedKeySpec spec = new PKCS8EncodedKeySpec(Base64.getDecoder().decode(pem));
    PrivateKey secret =
        KeyFactory.getInstance(chain[0].getPublicKey().getAlgorithm()).generatePrivate(spec);
    KeyStore store = KeyStore.getInstance("PKCS12");
    store.load(null, null);
    store.setKeyEntry("backend", secret, new char[0], chain);
    return store;
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
      SslConnection connection = new CountingConnection(connector, endPoint, engine, this, strict);
      connection.addHandshakeListener(
          new SslHandshakeListener() {
            @Override
            public void handshakeSucceeded(Event event) {
              (certified.remove(event.getSSLEngine()) ? full : resumed).incrementAndGet();
            }

            @Override
            public void handshakeFailed(Event event, Throwable failure) {
              certified.remove(event.getSSLEngine());
              failed.incrementAndGet();
            }
          });
      return connection;
    }
  }

  /** Sees resets, which Jetty turns into an end of input. */
  private static final class CountingConnector extends ServerConnector {
    CountingConnector(Server server, ConnectionFactory... factories) {
      super(server, 1, 1, factories);
    }

    @Override
    protected ChannelEndPoint newEndPoint(
        SocketChannel channel, ManagedSelector selectSet, SelectionKey key) {
      SocketChannelEndPoint endPoint =
          new SocketChannelEndPoint(channel, selectSet, key, getScheduler()) {
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
                resets.incrementAndGet();
                shutdownInput();
                return -1;
              } finally {
                BufferUtil.flipToFlush(buffer, position);
              }
            }
          };
      endPoint.setIdleTimeout(getIdleTimeout());
      return endPoint;
    }
  }

  /** Sees how the peer ends the connection. */
  private static final class CountingConnection extends SslConnection {
    private final boolean strict;
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
    protected SSLEngineResult unwrap(SSLEngine engine, ByteBuffer input, ByteBuffer output)
        throws SSLException {
      SSLEngineResult result = super.unwrap(engine, input, output);
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
        // A reset in the middle of a response shows here alone: Jetty reads no more.
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

  /** Records which engines take the certificate. */
  private static final class Recorder extends X509ExtendedKeyManager {
    private final X509ExtendedKeyManager inner;

    Recorder(X509ExtendedKeyManager inner) {
      this.inner = inner;
    }

    @Override
    public String chooseEngineServerAlias(String type, Principal[] issuers, SSLEngine engine) {
      certified.add(engine);
      return inner.chooseEngineServerAlias(type, issuers, engine);
    }

    @Override
    public String[] getClientAliases(String type, Principal[] issuers) {
      return inner.getClientAliases(type, issuers);
    }

    @Override
    public String chooseClientAlias(String[] types, Principal[] issuers, Socket socket) {
      return inner.chooseClientAlias(types, issuers, socket);
    }

    @Override
    public String[] getServerAliases(String type, Principal[] issuers) {
      return inner.getServerAliases(type, issuers);
    }

    @Override
    public String chooseServerAlias(String type, Principal[] issuers, Socket socket) {
      return inner.chooseServerAlias(type, issuers, socket);
    }

    @Override
    public X509Certificate[] getCertificateChain(String alias) {
      return inner.getCertificateChain(alias);
    }

    @Override
    public PrivateKey getPrivateKey(String alias) {
      return inner.getPrivateKey(alias);
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
                  "{\"full\":%d,\"resumed\":%d,\"failed\":%d,\"connections\":%d,\"requests\":%d,"
                      + "\"unclean\":%d,\"resets\":%d}%n",
                  full.get(),
                  resumed.get(),
                  failed.get(),
                  connections.get(),
                  requests.get(),
                  unclean.get(),
                  resets.get()));
    }
  }
}
