package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// example are results of three rounds, in which Reseal was better than the peer of the
// release twice and got the same from the newest.
func example() *results {
	r := newResults(&bed{
		options: options{workload: regexp.MustCompile("^(h1|h1-h2|active)$"), linear: true},
		proxies: []*proxy{
			{key: "haproxy", title: "HAProxy 2.6"}, {key: "nginx", title: "nginx 1.22"},
			{key: "haproxy-new", title: "HAProxy 3.2", newest: true}, {key: "nginx-new", title: "nginx 1.30", newest: true},
			{key: keyReseal, title: "Reseal"},
		},
	})
	for i := range 3 {
		f := float64(i + 1)
		r.add("h1", "haproxy", 20*f)
		r.add("h1", "nginx", 30)
		r.add("h1", "haproxy-new", 31)
		r.add("h1", "nginx-new", 25)
		r.add("h1", keyReseal, 25)
		r.add("h1-h2", "haproxy", 10)
		r.add("h1-h2", keyReseal, 5)
		r.add("active", keyReseal, f)
	}
	return r
}

func TestTable(t *testing.T) {
	want := `| 1 KB answers, TLS on both legs | HAProxy 2.6 | nginx 1.22 | HAProxy 3.2 | nginx 1.30 | Reseal | Reseal to HAProxy 2.6 | to the best of the newest |
| --- | --- | --- | --- | --- | --- | --- | --- |
| HTTP/1.1, keep-alive, µs/request | 40.0 | 30.0 | 31.0 | 25.0 | 25.0 | 0.62 (0.42–1.25), ≤ 0.65 | 1.00 (1.00–1.00), ≤ 0.75 |
| HTTP/1.1 → HTTP/2 pool, µs/request | 10.0 | – | – | – | 5.0 | 0.50 (0.50–0.50), ≤ 0.70 | – |

| Reseal, HTTP/1.1 keep-alive, cost of a request | times |
| --- | --- |
| 5,000 active connections instead of 32 | 2.00 (1.00–3.00) |
`
	var got bytes.Buffer
	if err := example().write(&got, formMarkdown); err != nil {
		t.Fatal(err)
	}
	if got.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &got, want)
	}

	readme := filepath.Join(t.TempDir(), "README.md")
	if err := os.WriteFile(readme, []byte("before\n"+tableBegins+"old\n"+tableEnds+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := example().replace(readme); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != "before\n"+tableBegins+want+tableEnds+"after\n" {
		t.Errorf("the file holds\n%s", text)
	}
}

// TestGrowthOfPeers: where peers were measured they stand beside Reseal.
func TestGrowthOfPeers(t *testing.T) {
	r := example()
	r.growths = growths()
	r.add("routes", keyReseal, 1)
	r.add("active", "nginx", 3)
	var got bytes.Buffer
	if err := grid(&got, r.growthRows(), true); err != nil {
		t.Fatal(err)
	}
	want := `| Reseal, HTTP/1.1 keep-alive, cost of a request | times | nginx 1.22 |
| --- | --- | --- |
| 5,000 active connections instead of 32 | 2.00 (1.00–3.00) | 3.00 (3.00–3.00) |
| 1,000 routes and pools instead of 3 | 1.00 (1.00–1.00) | – |
`
	if got.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &got, want)
	}
}

// TestReadme keeps the place of the table in the README.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(text, []byte(tableBegins)) || !bytes.Contains(text, []byte(tableEnds)) {
		t.Error("the README has no place for the table")
	}
}

func TestFlags(t *testing.T) {
	tests := []struct {
		args string
		code int // 0: options
	}{
		{"", 0},
		{"-short -only reseal,haproxy-new -workload h2 -json", 0},
		{"-only apache", 2},
		{"-rounds 0", 2},
		{"-workload (", 2},
		{"more", 2},
		{"-none", 2},
	}
	for _, test := range tests {
		var stderr bytes.Buffer
		o, code := parse(strings.Fields(test.args), &stderr)
		if code != test.code || (o != nil) != (code == 0) || (stderr.Len() > 0) != (code != 0) {
			t.Errorf("%q: options %v, code %d, %q", test.args, o, code, &stderr)
		}
	}
	if o, code := parse([]string{"-help"}, &bytes.Buffer{}); o != nil || code != 0 {
		t.Errorf("-help: options %v, code %d", o, code)
	}
}
