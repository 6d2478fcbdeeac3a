package manifest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func writeFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLoad(t *testing.T) {
	dir := writeFiles(t, map[string]string{
		"b.yaml":      strings.ReplaceAll(jetty, "jetty", "b"),
		"a.yml":       strings.ReplaceAll(jetty, "jetty", "a"),
		"c.json":      `{"apiVersion":"reseal/v1","kind":"Keyring","metadata":{"name":"c"}}`,
		"README.md":   "no manifest: [",
		"sub/d.yaml":  "not: [read",
		"single.conf": strings.ReplaceAll(jetty, "jetty", "single"),
	})
	stdin := strings.NewReader(strings.ReplaceAll(jetty, "jetty", "stdin"))
	objects, err := Load([]string{dir, "-", filepath.Join(dir, "single.conf")}, stdin)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, object := range objects {
		names = append(names, object.Resource.Metadata.Name)
	}
	if got, want := strings.Join(names, " "), "a b c stdin single"; got != want {
		t.Errorf("loaded %s, want %s", got, want)
	}
}

func TestLoadReportsAllFiles(t *testing.T) {
	dir := writeFiles(t, map[string]string{
		"a.yaml": jetty,
		"b.yaml": jetty + "  x: 1\n",
		"c.yaml": "{",
	})
	empty := t.TempDir()
	stdin := iotest.ErrReader(errors.New("broken pipe"))
	objects, err := Load([]string{dir, filepath.Join(dir, "none.yaml"), empty, "-"}, stdin)
	wantErrors(t, err,
		dir+"/b.yaml:1:1: BackendPool/jetty: is there twice, first at "+dir+"/a.yaml:1:1; remove one",
		dir+"/b.yaml:8:3: BackendPool/jetty: spec.x: unknown field; known here: endpoints, dns, protocol, tls, sessions, connections, loadBalancing, healthCheck, outlierDetection, timeouts, retries",
		dir+"/c.yaml:1: not valid YAML: did not find expected node content",
		dir+"/none.yaml: no such file or directory",
		empty+": the directory holds no *.yaml, *.yml or *.json file",
		"stdin: broken pipe",
	)
	if len(objects) != 1 {
		t.Errorf("%d objects, want the one without an error", len(objects))
	}
}

func TestLoadNamesTakesWhatIsNotValid(t *testing.T) {
	text := "apiVersion: reseal/v1\nkind: Certificate\nmetadata: {name: web}\nspec: {privateKeyPem: <redacted>}\n"
	if _, err := Load([]string{"-"}, strings.NewReader(text)); err == nil {
		t.Error("Load takes a redacted key")
	}
	objects, err := LoadNames([]string{"-"}, strings.NewReader(text))
	if err != nil || len(objects) != 1 {
		t.Errorf("%d objects, %v; want 1", len(objects), err)
	}
}
