import java.io.IOException;
import java.nio.file.Path;
import javax.servlet.http.HttpServlet;
import javax.servlet.http.HttpServletRequest;
import javax.servlet.http.HttpServletResponse;
import org.apache.catalina.Context;
import org.apache.catalina.connector.Connector;
import org.apache.catalina.startup.Tomcat;
import org.apache.tomcat.util.net.SSLHostConfig;
import org.apache.tomcat.util.net.SSLHostConfigCertificate;

/**
 * Tomcat with its defaults. Arguments: certificate file, key file, "TLSv1.2" or "any", port, folder
 * for its files. It prints "READY".
 */
public final class TomcatServer {
  private TomcatServer() {}

  public static void main(String[] args) throws Exception {
    SSLHostConfig tls = new SSLHostConfig();
    if (!args[2].equals("any")) {
      tls.setProtocols(args[2]);
    }
    SSLHostConfigCertificate certificate =
        new SSLHostConfigCertificate(tls, SSLHostConfigCertificate.Type.UNDEFINED);
    certificate.setCertificateKeystore(Pem.keyStore(Path.of(args[0]), Path.of(args[1])));
    certificate.setCertificateKeystorePassword("");
    tls.addCertificate(certificate);

    Connector connector = new Connector("HTTP/1.1");
    connector.setPort(Integer.parseInt(args[3]));
    connector.setProperty("address", "127.0.0.1");
    connector.setProperty("SSLEnabled", "true");
    connector.setScheme("https");
    connector.setSecure(true);
    connector.addSslHostConfig(tls);

    Tomcat tomcat = new Tomcat();
    tomcat.setBaseDir(args[4]);
    tomcat.setConnector(connector);
    Context context = tomcat.addContext("", null);
    Tomcat.addServlet(context, "hello", new Hello());
    context.addServletMappingDecoded("/*", "hello");
    tomcat.start();
    System.out.println("READY");
    tomcat.getServer().await();
  }

  private static final class Hello extends HttpServlet {
    private static final long serialVersionUID = 1;

    @Override
    protected void doGet(HttpServletRequest request, HttpServletResponse response)
        throws IOException {
      response.setContentType("text/plain");
      response.getWriter().println("hello");
    }
  }
}
