package integration

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// caFile makes the pool's roots those of a file on the edge.
func caFile(pool string, authority []byte, path string) string {
	inline := "caPem: |\n" + harness.Indent(authority, 8)
	return strings.Replace(pool, inline, "caFile: "+path, 1)
}

// leaf is the certificate that a listener shows.
func (p *pair) leaf(t *testing.T, address string) *x509.Certificate {
	t.Helper()
	client := p.Client(t, address, false)
	client.Transport.(*http.Transport).DisableKeepAlives = true
	response, err := client.Get("https://" + harness.SiteName + peers.Small)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	return response.TLS.PeerCertificates[0]
}

// TestFilesOnTheEdge: paths that lead to what never ends, and a pair that is
// renewed in two steps while another resource is refused.
func TestFilesOnTheEdge(t *testing.T) {
	p := newPair(t)
	dir := t.TempDir()
	pipe, crt, key := filepath.Join(dir, "pipe"), filepath.Join(dir, "crt"), filepath.Join(dir, "key")
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first := p.Issue()
	write(crt, first.Certificate)
	write(key, first.Key)
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	files := fmt.Sprintf("---\napiVersion: reseal/v1\nkind: Certificate\nmetadata: {name: site}\nspec: {certificateFile: %s, privateKeyFile: %s}\n", crt, key)
	p.WaitAcked(p.Apply(files), p.edges[:]...)

	for i, path := range []string{pipe, "/dev/zero", dir} {
		bad := caFile(p.Pool("bad", p.backends, ""), p.Authority.PEM(), path)
		address := p.Address()
		name := fmt.Sprint("beside-", i)
		revision := p.Apply(bad + harness.Route("bad", "web-a", "bad."+harness.SiteName, "bad", "") + harness.Listener(name, address, "edge: a", "  pool: app\n"))
		_, edges := p.WaitEdges("partly", func(e harness.EdgeStatus) bool { return e.State == "partly" && e.Nack.Revision == revision }, "edge-a")
		nack := edges[0].Nack
		if !slices.Equal(nack.HeldBack, []string{"BackendPool/bad", "Route/bad"}) || nack.Violations[0].Field != "spec.tls.trust.caFile" ||
			!strings.Contains(nack.Violations[0].Description, "is not a regular file") {
			t.Errorf("%s: %+v", path, nack)
		}
		if err := harness.Get(t.Context(), p.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
			t.Errorf("a listener beside %s: %v", path, err)
		}
	}

	// The certificate alone does not fit the key: the old pair stays, the fleet
	// hears of it, and the new pair is served once it is whole.
	before := p.leaf(t, p.addresses[0])
	second := p.Issue()
	block, _ := pem.Decode(second.Certificate)
	write(crt, second.Certificate)
	p.WaitEdges("aware of the half-written pair", func(e harness.EdgeStatus) bool {
		return e.Nack != nil && slices.Contains(e.Nack.HeldBack, "Certificate/site")
	}, "edge-a", "edge-b")
	if !p.leaf(t, p.addresses[0]).Equal(before) {
		t.Error("half a pair is served")
	}
	write(key, second.Key)
	p.WaitEdges("synced", func(e harness.EdgeStatus) bool { return e.State == "synced" }, "edge-b")
	for deadline := time.Now().Add(time.Minute); !slices.Equal(p.leaf(t, p.addresses[0]).Raw, block.Bytes); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the renewed pair is not served while another resource is refused")
		}
	}
	if edge := p.Edges()[0]; edge.State != "partly" || !slices.Equal(edge.Nack.HeldBack, []string{"BackendPool/bad", "Route/bad"}) {
		t.Errorf("edge-a: %+v", edge)
	}
	p.Ctl("delete", "route/bad", "backendpool/bad")
	p.WaitEdges("synced", func(e harness.EdgeStatus) bool { return e.State == "synced" }, "edge-a", "edge-b")
}

// TestCrashLoop: a configuration during whose trial the edge's process ended twice
// is not applied again. The edge goes back to the one before and says so.
func TestCrashLoop(t *testing.T) {
	p := newPair(t)
	good := p.Edges()[0].AckedRevision
	edge := p.edges[0]
	time.Sleep(12 * time.Second) // until what is in force is better than nothing

	bad := p.Apply(harness.Route("bad", "web-a", harness.SiteName, "app", "  responseHeaders: {set: {X-Bad: yes}}\n"))
	isBad := func() bool {
		response, err := p.Client(t, p.addresses[0], false).Get("https://" + harness.SiteName + peers.Small)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		return response.Header.Get("X-Bad") == "yes"
	}
	for range 2 {
		p.WaitEdges("serving it", func(e harness.EdgeStatus) bool { return e.State == "synced" && e.AckedRevision == bad }, edge.ID)
		if !isBad() {
			t.Fatal("the new configuration is not in force")
		}
		edge.Kill()
		edge.Start()
	}
	_, edges := p.WaitEdges("back at the older one", func(e harness.EdgeStatus) bool {
		return e.State == "refused" && e.Nack.ServingRevision == good
	}, edge.ID)
	if text := edges[0].Nack.Violations[0].Description; !strings.Contains(text, "2 times this edge's process ended") {
		t.Errorf("refused by %q", text)
	}
	if described := p.Ctl("describe", "edge", edge.ID); !strings.Contains(described, fmt.Sprintf("2 times soon after it took revision %d", bad)) {
		t.Errorf("described as\n%s", described)
	}
	edge.WaitReady()
	p.serve(0)
	if isBad() {
		t.Error("it is served all the same")
	}
	// Any other configuration is applied at once.
	p.WaitAcked(p.Apply(harness.Route("bad", "web-a", harness.SiteName, "app", "  responseHeaders: {set: {X-Bad: \"no\"}}\n")), edge)
}
