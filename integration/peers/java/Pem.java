import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;

/** Reads PEM files, in which Java does not keep its keys. */
final class Pem {
  private Pem() {}

  /** A store with a certificate chain and its key (PKCS #8), without password. */
  static KeyStore keyStore(Path certificate, Path key) throws Exception {
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
}
