package http2

import (
	"net"
	"os"
	"os/exec"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// TestH2spec runs h2spec against a server made of the machine.
func TestH2spec(t *testing.T) {
	h2spec := os.Getenv("RESEAL_H2SPEC")
	if h2spec == "" {
		t.Skip("RESEAL_H2SPEC doesn't name the program; `make h2spec` builds it and runs this test")
	}
	address := listen(t, func(conn net.Conn) {
		d := drive(t, conn, NewServer(Config{}), func(d *driver, ev *Event) {
			response := exchange.Response{Status: 200, Length: exchange.UnknownLength}
			switch {
			case ev.Kind == Request && ev.Request.Method == "HEAD":
				d.respond(ev.Stream, response, nil, nil)
			case ev.Kind == Request && ev.Request.Method != "POST", (ev.Kind == Data || ev.Kind == Trailers) && ev.End:
				d.respond(ev.Stream, response, []byte("hello, h2spec"), nil)
			}
		})
		<-d.done
	})
	_, port, _ := net.SplitHostPort(address.String())
	output, err := exec.Command(h2spec, "-h", "127.0.0.1", "-p", port, "-o", "2", "--strict").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	t.Logf("%s", output)
}
