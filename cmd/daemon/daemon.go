// Package daemon is what the two daemons' commands share: flags that also come
// from a file or the environment, signals, logs and the plain HTTP page.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sync/errgroup"
)

// Exit codes of the daemons.
const (
	ExitOK      = 0
	ExitFailure = 1
	ExitUsage   = 2
)

// Flags are a daemon's flags with those that every daemon has.
type Flags struct {
	*pflag.FlagSet
	config    *string
	version   *bool
	logLevel  *string
	logFormat *string
	envPrefix string
}

// NewFlags makes the flag set of the daemon name. A flag that the command line
// does not set is taken from the environment variable
// RESEAL_<DAEMON>_<FLAG>, then from the file that --config names, a YAML map
// with the flags' names as keys.
func NewFlags(name, summary string, output io.Writer) *Flags {
	set := pflag.NewFlagSet(name, pflag.ContinueOnError)
	set.SortFlags = false
	set.SetOutput(output)
	env := "RESEAL_" + strings.ToUpper(strings.TrimPrefix(name, "reseal-")) + "_"
	env = strings.ReplaceAll(env, "-", "_")
	set.Usage = func() {
		fmt.Fprintf(output, "%s\n\nUsage: %s [flags]\n\n%s\nEach flag can also be set by an environment variable (%sLISTEN for --listen)\nor in the file of --config (listen: …). The command line wins, then the environment.\n",
			summary, name, set.FlagUsages(), env)
	}
	return &Flags{
		FlagSet:   set,
		config:    set.String("config", "", "YAML file with flags, `FILE`"),
		version:   set.Bool("version", false, "print the version and exit"),
		logLevel:  set.String("log-level", "info", "debug, info, warn or error"),
		logFormat: set.String("log-format", "json", "json or text"),
		envPrefix: env,
	}
}

// Parse reads the command line, the environment and the file. done means that the
// process ends with code: help or version was asked for, or a flag is wrong,
// which has been reported on the flags' output.
func (f *Flags) Parse(args []string, version string) (done bool, code int) {
	err := f.FlagSet.Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return true, ExitOK
	case err != nil:
		return f.Usagef("%v", err)
	case *f.version:
		fmt.Fprintln(f.Output(), f.Name(), version)
		return true, ExitOK
	case f.NArg() > 0:
		return f.Usagef("unexpected argument %q", f.Arg(0))
	}
	if err := f.fill(); err != nil {
		return f.Usagef("%v", err)
	}
	return false, ExitOK
}

// Usagef reports on the flags' output what is wrong with the call.
func (f *Flags) Usagef(format string, args ...any) (done bool, code int) {
	fmt.Fprintf(f.Output(), "%s: %s\nSee '%s --help'.\n", f.Name(), fmt.Sprintf(format, args...), f.Name())
	return true, ExitUsage
}

// fill sets the flags that the command line left.
func (f *Flags) fill() error {
	var errs []error
	f.VisitAll(func(flag *pflag.Flag) {
		name := f.envPrefix + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		if value, ok := os.LookupEnv(name); ok && !flag.Changed {
			if err := f.Set(flag.Name, value); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		}
	})
	if *f.config != "" {
		errs = append(errs, f.fillFromFile(*f.config))
	}
	return errors.Join(errs...)
}

func (f *Flags) fillFromFile(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	values := map[string]any{}
	if err := yaml.Unmarshal(data, &values); err != nil {
		return fmt.Errorf("--config: %s: %w", path, err)
	}
	for name, value := range values {
		flag := f.Lookup(name)
		if flag == nil || name == "config" {
			return fmt.Errorf("--config: %s: there is no flag %q", path, name)
		}
		if flag.Changed {
			continue
		}
		if err := f.Set(name, flagText(value)); err != nil {
			return fmt.Errorf("--config: %s: %s: %w", path, name, err)
		}
	}
	return nil
}

// flagText writes a YAML value as it would stand on a command line: lists and
// maps with commas.
func flagText(value any) string {
	switch value := value.(type) {
	case []any:
		parts := make([]string, len(value))
		for i, part := range value {
			parts[i] = fmt.Sprint(part)
		}
		return strings.Join(parts, ",")
	case map[string]any:
		var parts []string
		for key, part := range value {
			parts = append(parts, fmt.Sprintf("%s=%v", key, part))
		}
		return strings.Join(parts, ",")
	default:
		return fmt.Sprint(value)
	}
}

// Logger writes to w as the flags say.
func (f *Flags) Logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(*f.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not one of debug, info, warn, error", *f.logLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch *f.logFormat {
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	default:
		return nil, fmt.Errorf("--log-format: %q is neither json nor text", *f.logFormat)
	}
}

// Run runs all functions until each has returned, and ends all of them when one
// fails. It returns the process' exit code.
func Run(ctx context.Context, logger *slog.Logger, functions ...func(context.Context) error) int {
	group, inner := errgroup.WithContext(ctx)
	for _, function := range functions {
		group.Go(func() error { return function(inner) })
	}
	err := group.Wait()
	if err == nil || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return ExitOK
	}
	logger.Error("stopped", "error", err.Error())
	return ExitFailure
}

// SignalContext ends with SIGINT or SIGTERM. A second signal ends the process
// at once. SIGPIPE is ignored: a reader of our output that goes away is an error
// of that output, not the end of the daemon.
func SignalContext() (context.Context, context.CancelFunc) {
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// OnReload returns a function for Run that calls reload at each SIGHUP and
// SIGUSR1. Once OnReload has been called, neither signal ends the process.
func OnReload(logger *slog.Logger, reload func()) func(context.Context) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
	return func(ctx context.Context) error {
		// The signals stay ours: one that comes during the drain must not end it.
		for {
			select {
			case <-ctx.Done():
				return nil
			case received := <-signals:
				logger.Info("reload", "signal", received.String())
				reload()
			}
		}
	}
}
