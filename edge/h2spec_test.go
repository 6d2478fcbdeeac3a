package edge

import (
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"testing"
)

// TestH2spec runs h2spec against an edge in front of a plain backend.
func TestH2spec(t *testing.T) {
	h2spec := os.Getenv("RESEAL_H2SPEC")
	if h2spec == "" {
		t.Skip("RESEAL_H2SPEC doesn't name the program; `make h2spec` builds it and runs this test")
	}
	x := newLegs(t, serveHandler(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "hello, h2spec")
	})))
	_, port, _ := net.SplitHostPort(x.edge.frontend.Addr("web").String())
	output, err := exec.Command(h2spec, "-h", "127.0.0.1", "-p", port, "-t", "-k", "-o", "3", "--strict").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	t.Logf("%s", output)
}
