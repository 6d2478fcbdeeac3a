import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/**
 * Plain JSSE on sockets, for tests: it echoes. Arguments: PKCS #12 file, its password, PEM file of
 * trusted roots or "" for no client certificates. It prints "READY port".
 */
public final class Sockets {
  private Sockets() {}

  public static void main(String[] args) throws Exception {
    char[] password = args[1].toCharArray();
    KeyStore keys = KeyStore.getInstance("PKCS12");
    try (InputStream in = Files.newInputStream(Path.of(args[0]))) {
      keys.load(in, password);
    }
    KeyManagerFactory mine = KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
    mine.init(keys, password);
    TrustManagerFactory theirs = null;
    if (!args[2].isEmpty()) {
      KeyStore roots = KeyStore.getInstance("PKCS12");
      roots.load(null, null);
      try (InputStream in = Files.newInputStream(Path.of(args[2]))) {
        roots.setCertificateEntry(
            "root", CertificateFactory.getInstance("X.509").generateCertificate(in));
      }
      theirs = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
      theirs.init(roots);
    }
    SSLContext context = SSLContext.getInstance("TLS");
    context.init(mine.getKeyManagers(), theirs == null ? null : theirs.getTrustManagers(), null);
    SSLServerSocket server =
        (SSLServerSocket)
            context
                .getServerSocketFactory()
                .createServerSocket(0, 50, InetAddress.getLoopbackAddress());
    server.setNeedClientAuth(theirs != null);
    System.out.println("READY " + server.getLocalPort());
    while (true) {
      SSLSocket socket = (SSLSocket) server.accept();
      new Thread(
              () -> {
                try (socket) {
                  InputStream in = socket.getInputStream();
                  OutputStream out = socket.getOutputStream();
                  in.transferTo(out);
                } catch (Exception e) {
                  System.out.println(e);
                }
              })
          .start();
    }
  }
}
