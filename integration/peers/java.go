package peers

import (
	"context"
	"crypto/sha256"
	_ "embed" // what the Java servers share
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/reseal/reseal/integration/process"
)

//go:embed java/Pem.java
var javaPem []byte

// javaProgram is a Java server that is compiled when it is first needed.
type javaProgram struct {
	name, main string
	sources    map[string][]byte // by file name
	jars       []string          // names of Debian's jars, without directory and .jar
	install    string            // says how to get them
}

// Javas are the homes of the installed Javas: "", which is that of PATH, and
// newer ones in Debian's directory for them.
func Javas() []string {
	homes := []string{""}
	current, err := process.Find("java", "")
	if err != nil {
		return homes
	}
	current, _ = filepath.EvalSymlinks(current)
	oldest := javaVersion(filepath.Dir(filepath.Dir(current)))
	seen := map[int]bool{oldest: true}
	found, _ := filepath.Glob("/usr/lib/jvm/*/bin/java")
	for _, path := range found {
		home := filepath.Dir(filepath.Dir(path))
		if version := javaVersion(home); version > oldest && !seen[version] {
			seen[version] = true
			homes = append(homes, home)
		}
	}
	return homes
}

// javaVersion is the first number of a Java's version, as its file "release"
// says, or 0.
func javaVersion(home string) int {
	text, err := os.ReadFile(filepath.Join(home, "release"))
	if err != nil {
		return 0
	}
	var version int
	for line := range strings.Lines(string(text)) {
		if n, _ := fmt.Sscanf(line, "JAVA_VERSION=\"%d", &version); n == 1 {
			return version
		}
	}
	return 0
}

// start compiles and starts the server.
func (p javaProgram) start(ctx context.Context, o Options, java []string, onLine func(string) bool, args ...string) (*process.Process, error) {
	classPath, err := p.compile(ctx, o.Dir)
	if err != nil {
		return nil, err
	}
	path := "java"
	if o.JavaHome != "" {
		path = filepath.Join(o.JavaHome, "bin", "java")
	}
	java = append([]string{
		"-Xmx512m", "-XX:+UseSerialGC", pick(o.Bulk, "-XX:+TieredCompilation", "-XX:TieredStopAtLevel=1"), "-XX:-UsePerfData",
		"-Djava.io.tmpdir=" + o.Dir,
	}, java...)
	java = append(java, "-cp", classPath, p.main)
	return process.Start(process.Config{Name: p.name, Path: path, Install: p.install, Args: append(java, args...), OnLine: onLine})
}

// compile compiles the server once per version of its source and returns the
// class path.
func (p javaProgram) compile(ctx context.Context, fallback string) (string, error) {
	javac, err := process.Find("javac", p.install)
	if err != nil {
		return "", err
	}
	var jars []string
	for _, name := range p.jars {
		jar := "/usr/share/java/" + name + ".jar"
		if _, err := os.Stat(jar); err != nil {
			return "", fmt.Errorf("%s: %w: %s", jar, process.ErrMissing, p.install)
		}
		jars = append(jars, jar)
	}
	path := strings.Join(jars, ":")
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = fallback
	}
	hash := sha256.New()
	names := slices.Sorted(maps.Keys(p.sources))
	for _, name := range names {
		_, _ = hash.Write(p.sources[name])
	}
	_, _ = hash.Write([]byte(path))
	classes := filepath.Join(cache, "reseal-integration", fmt.Sprintf("%s-%x", p.name, hash.Sum(nil)[:8]))
	if _, err := os.Stat(classes); err == nil {
		return classes + ":" + path, nil
	}
	if err := os.MkdirAll(filepath.Dir(classes), 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(filepath.Dir(classes), "javac-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	output := filepath.Join(work, "classes")
	args := []string{"-cp", path, "-d", output}
	for _, name := range names {
		source, err := writeFile(work, name, p.sources[name])
		if err != nil {
			return "", err
		}
		args = append(args, source)
	}
	if text, err := exec.CommandContext(ctx, javac, args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("javac: %w\n%s", err, text)
	}
	// Another test may have been faster; its result is as good.
	if err := os.Rename(output, classes); err != nil {
		if _, missing := os.Stat(classes); missing != nil {
			return "", err
		}
	}
	return classes + ":" + path, nil
}

func protocolName(mode Mode) string { return pick(mode == TLS13, "TLSv1.3", "TLSv1.2") }

func pick(condition bool, yes, no string) string {
	if condition {
		return yes
	}
	return no
}
